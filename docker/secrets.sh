#!/bin/sh
# secrets.sh [DIR]: makes the secrets of compose.yaml and of kuberay/ that are not there yet, one
# folder a service. Nobody else may enter the folder; inside, files are readable because the users
# of the containers are not that of the host. To rotate one, remove it and start again.
set -eu
umask 022
dir=${1:-"$(dirname "$0")/secrets"}
mkdir -p "$dir" && chmod 700 "$dir"

random() {
    od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'
}

make() {
    if [ ! -s "$dir/$1" ]; then
        mkdir -p "$dir/$(dirname "$1")"
        random "$2" >"$dir/$1.part"
        mv "$dir/$1.part" "$dir/$1"
    fi
}

make ray/auth_token 32
make mlflow/password 24
make mlflow/flask_key 32
make postgres/password 24
make store/access_key 12
make store/secret_key 24
cat >"$dir/store/identities.json" <<IDENTITIES
{
  "identities": [
    {
      "name": "mlflow",
      "credentials": [
        {
          "accessKey": "$(cat "$dir/store/access_key")",
          "secretKey": "$(cat "$dir/store/secret_key")"
        }
      ],
      "actions": ["Admin", "Read", "List", "Tagging", "Write"]
    }
  ]
}
IDENTITIES
