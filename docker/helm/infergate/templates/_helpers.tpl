{{/* tests/deploy.rs renders this chart: if, else, end, include, toYaml, nindent, quote, default, add, eq, not. */}}
{{- define "infergate.name" -}}
{{ .Release.Name }}
{{- end -}}
{{- define "infergate.selector" -}}
app.kubernetes.io/name: infergate
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}
{{- define "infergate.labels" -}}
{{ include "infergate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
