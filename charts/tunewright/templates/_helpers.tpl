{{- define "tunewright.name" -}}
{{- if contains "tunewright" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-tunewright" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Labels that select pods; (dict "root" . "component" "api") */}}
{{- define "tunewright.selector" -}}
app.kubernetes.io/name: tunewright
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "tunewright.labels" -}}
{{ include "tunewright.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* An image in full; (dict "root" . "image" "tunewright/api") */}}
{{- define "tunewright.image" -}}
{{- $image := .image }}
{{- if not (or (contains "@" $image) (regexMatch ":[^/]+$" $image)) }}
{{- $image = printf "%s:%s" $image (default .root.Chart.AppVersion .root.Values.image.tag) }}
{{- end }}
{{- if .root.Values.image.registry }}{{ trimSuffix "/" .root.Values.image.registry }}/{{ end }}{{ $image }}
{{- end }}

{{- define "tunewright.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "tunewright.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What the pods of both components share; (dict "root" . "component" "api") */}}
{{- define "tunewright.podCommon" -}}
{{- $own := index .root.Values .component }}
serviceAccountName: {{ include "tunewright.name" .root }}-{{ .component }}
securityContext:
  {{- include "tunewright.podSecurity" . | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $own.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
Rights of one component: a ClusterRole, or a Role in each of `namespaces`; (dict "root" . "component" "api" "rules" "yaml")
*/}}
{{- define "tunewright.rights" -}}
{{- $root := .root }}
{{- $name := printf "%s-%s" (include "tunewright.name" .root) .component }}
{{- $labels := include "tunewright.labels" . }}
{{- $rules := .rules }}
{{- if not $root.Values.namespaces }}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ $name }}
  labels:
    {{- $labels | nindent 4 }}
rules:
  {{- $rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ $name }}
  labels:
    {{- $labels | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $name }}
    namespace: {{ $root.Release.Namespace }}
{{- end }}
{{- range $namespace := $root.Values.namespaces }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- $labels | nindent 4 }}
rules:
  {{- $rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ $name }}
  namespace: {{ $namespace }}
  labels:
    {{- $labels | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $name }}
    namespace: {{ $root.Release.Namespace }}
{{- end }}
{{- end }}
