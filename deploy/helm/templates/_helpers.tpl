{{/* Labels of every object. Objects of a component pass its name. */}}
{{- define "sms.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: sms-channel-operator
{{- end }}

{{- define "sms.image" -}}
{{- $image := .Values.image -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}{{ with $image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/*
The operators, as a JSON array of name (of ServiceAccount, Deployment and Lease), shard and namespaces: one for each
shard, or one for all namespaces.
*/}}
{{- define "sms.operators" -}}
{{- $operators := list -}}
{{- range $shard, $namespaces := .Values.operator.shards -}}
{{- $operators = append $operators (dict "name" (printf "sms-channel-operator-%s" $shard) "shard" $shard "namespaces" $namespaces) -}}
{{- else -}}
{{- $operators = list (dict "name" "sms-channel-operator" "shard" "" "namespaces" .Values.channelNamespaces) -}}
{{- end -}}
{{ toJson $operators }}
{{- end }}

{{/* Settings by their names in values (camelCase) as environment variables with a prefix. */}}
{{- define "sms.settings" -}}
{{- range $name, $value := .settings }}
- name: {{ $.prefix }}_{{ $name | snakecase | upper }}
  value: {{ if kindIs "slice" $value }}{{ join " " $value | quote }}{{ else if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value | int64 | quote }}{{ else }}{{ $value | quote }}{{ end }}
{{- end }}
{{- end }}

{{- define "sms.proxy" -}}
{{- with .Values.proxy.https }}
- name: HTTPS_PROXY
  value: {{ . | quote }}
{{- end }}
{{- with .Values.proxy.http }}
- name: HTTP_PROXY
  value: {{ . | quote }}
{{- end }}
{{- if or .Values.proxy.https .Values.proxy.http }}
- name: NO_PROXY
  value: {{ prepend .Values.proxy.exceptions "$(KUBERNETES_SERVICE_HOST)" | join "," | quote }}
{{- end }}
{{- end }}

{{/* The port of a URL: the one it names, or its scheme's. */}}
{{- define "sms.port" -}}
{{- $url := urlParse . -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (eq $url.scheme "https" | ternary "443" "80") }}
{{- end }}

{{- define "sms.shimIsTls" -}}
{{- if ne .Values.shim.tls.mode "plainHttp" }}true{{ end }}
{{- end }}

{{- define "sms.shimNamespace" -}}
{{ .Values.shim.channelNamespace | default (first .Values.channelNamespaces) }}
{{- end }}

{{- define "sms.shimPort" -}}
{{ .Values.shim.service.port | default (ternary 443 80 (eq (include "sms.shimIsTls" .) "true")) }}
{{- end }}
