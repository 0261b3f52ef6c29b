#!/bin/sh
# Runs a command with secrets from files: where NAME_FILE names a file, NAME becomes its content.
set -eu
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD \
    MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_TRACKING_PASSWORD; do
    eval "file=\${${name}_FILE:-}"
    if [ -n "$file" ]; then
        if [ ! -s "$file" ]; then
            echo "entrypoint: ${name}_FILE=$file is missing or empty; docker/secrets.sh makes it" >&2
            exit 1
        fi
        value=$(cat "$file")
        export "$name=$value"
        unset "${name}_FILE"
    fi
done
exec "$@"
