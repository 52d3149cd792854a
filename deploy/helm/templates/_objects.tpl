{{- define "sms.podDisruptionBudget" }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "sms.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      app.kubernetes.io/name: {{ .name }}
  unhealthyPodEvictionPolicy: AlwaysAllow
{{- end }}

{{/* Takes root, name, and from: who may connect. */}}
{{- define "sms.networkPolicy" }}
{{- $values := .root.Values }}
{{- $ports := $values.networkPolicy.egressPorts.tcp }}
{{- range list $values.proxy.https $values.proxy.http }}
{{- with . }}
{{- $ports = append $ports (include "sms.port" . | int) | uniq }}
{{- end }}
{{- end }}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "sms.labels" . | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      app.kubernetes.io/name: {{ .name }}
  policyTypes: [Ingress, Egress]
  ingress:
    - from:
        {{- toYaml .from | nindent 8 }}
      ports:
        - {port: http, protocol: TCP}
  egress:
    - ports:
        {{- range $ports }}
        - {port: {{ . }}, protocol: TCP}
        {{- end }}
        {{- range $values.networkPolicy.egressPorts.udp }}
        - {port: {{ . }}, protocol: UDP}
        {{- end }}
{{- end }}

{{/* Takes root, name and scheme. */}}
{{- define "sms.podMonitor" }}
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "sms.labels" . | nindent 4 }}
    {{- with .root.Values.podMonitor.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      app.kubernetes.io/name: {{ .name }}
  podMetricsEndpoints:
    - port: http
      path: /metrics
      interval: {{ .root.Values.podMonitor.interval }}
      {{- if eq .scheme "HTTPS" }}
      scheme: https
      tlsConfig:
        insecureSkipVerify: true # the certificate is for the Service, Prometheus calls the pod's address
      {{- end }}
{{- end }}

{{/* Takes: root, name, file (of alerts). Each alert gets the address of its page, if there is one. */}}
{{- define "sms.prometheusRule" }}
{{- $rules := .root.Files.Get .file | fromYaml }}
{{- $pages := .root.Values.prometheusRule.runbookUrl | trimSuffix "/" }}
{{- if $pages }}
{{- range $group := $rules.groups }}
{{- range $rule := $group.rules }}
{{- $_ := set $rule.annotations "runbook_url" (printf "%s/%s.md" $pages $rule.alert) }}
{{- end }}
{{- end }}
{{- end }}
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "sms.labels" . | nindent 4 }}
    {{- with .root.Values.prometheusRule.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- toYaml $rules | nindent 2 }}
{{- end }}
