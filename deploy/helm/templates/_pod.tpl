{{/*
The Deployment's spec of a component. All defaults of the API server are written out, so that what is shipped equals what
it returns, which GitOps controllers compare.
Takes: root, name, values (of the component), module, port, scheme, grace (seconds), env (YAML), volumes and mounts (YAML).
*/}}
{{- define "sms.deploymentSpec" -}}
{{- $values := .values -}}
progressDeadlineSeconds: 600
replicas: {{ $values.replicas }}
revisionHistoryLimit: 10
selector:
  matchLabels:
    app.kubernetes.io/name: {{ .name }}
strategy:
  type: RollingUpdate
  rollingUpdate:
    maxSurge: 1
    maxUnavailable: 0
template:
  metadata:
    labels:
      {{- include "sms.labels" . | nindent 6 }}
      {{- with $values.podLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    annotations:
      kubectl.kubernetes.io/default-container: {{ .name }}
      {{- with $values.podAnnotations }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
  spec:
    automountServiceAccountToken: true
    serviceAccountName: {{ .name }}
    serviceAccount: {{ .name }}
    {{- with .root.Values.imagePullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    enableServiceLinks: false
    dnsPolicy: ClusterFirst
    restartPolicy: Always
    schedulerName: default-scheduler
    terminationGracePeriodSeconds: {{ .grace }}
    securityContext:
      {{- toYaml .root.Values.podSecurityContext | nindent 6 }}
    {{- with $values.priorityClassName }}
    priorityClassName: {{ . }}
    {{- end }}
    {{- with $values.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $values.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $values.affinity }}
    affinity:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    topologySpreadConstraints:
      {{- with $values.topologySpreadConstraints }}
      {{- toYaml . | nindent 6 }}
      {{- else }}
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector:
          matchLabels:
            app.kubernetes.io/name: {{ .name }}
        matchLabelKeys: [pod-template-hash]
      {{- end }}
    {{- with $values.extraInitContainers }}
    initContainers:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    containers:
      - name: {{ .name }}
        image: {{ include "sms.image" .root | quote }}
        imagePullPolicy: {{ .root.Values.image.pullPolicy }}
        command: [python, -m, {{ .module }}]
        {{- with $values.extraEnvFrom }}
        envFrom:
          {{- toYaml . | nindent 10 }}
        {{- end }}
        env:
          {{- .env | nindent 10 }}
          {{- with include "sms.proxy" .root | trim }}
          {{- . | nindent 10 }}
          {{- end }}
          {{- with $values.extraEnv }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        ports:
          - name: http
            containerPort: {{ .port }}
            protocol: TCP
        startupProbe:
          {{- include "sms.probe" (dict "path" "/healthz" "scheme" .scheme "period" 2 "failures" 60) | nindent 10 }}
        livenessProbe:
          {{- include "sms.probe" (dict "path" "/healthz" "scheme" .scheme "period" 10 "failures" 6) | nindent 10 }}
        readinessProbe:
          {{- include "sms.probe" (dict "path" "/readyz" "scheme" .scheme "period" 5 "failures" 2) | nindent 10 }}
        resources:
          {{- toYaml $values.resources | nindent 10 }}
        securityContext:
          {{- toYaml .root.Values.securityContext | nindent 10 }}
        terminationMessagePath: /dev/termination-log
        terminationMessagePolicy: FallbackToLogsOnError
        {{- if or .mounts $values.extraVolumeMounts }}
        volumeMounts:
          {{- with .mounts }}
          {{- . | nindent 10 }}
          {{- end }}
          {{- with $values.extraVolumeMounts }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        {{- end }}
      {{- with $values.extraContainers }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- if or .volumes $values.extraVolumes }}
    volumes:
      {{- with .volumes }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- with $values.extraVolumes }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- end }}
{{- end }}

{{- define "sms.probe" -}}
httpGet: {path: {{ .path }}, port: http, scheme: {{ .scheme }}}
periodSeconds: {{ .period }}
timeoutSeconds: 5
failureThreshold: {{ .failures }}
successThreshold: 1
{{- end }}
