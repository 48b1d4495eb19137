echo {{ name }} with priority {{ target.priority }} in {{ run | quote }}
cat > config.yaml <<CONFIG
{{ config }}CONFIG
