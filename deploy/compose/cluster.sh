#!/bin/sh
# Compose, led to this cluster: `cluster.sh ps`, `cluster.sh exec router gearfall status`.
# `cluster.sh up` without more builds the image, starts the cluster and says how to ask it.
set -eu
cd "$(dirname "$0")"

if docker compose version >/dev/null 2>&1; then
    compose="docker compose"
elif command -v docker-compose >/dev/null; then
    compose=docker-compose
else
    echo "Docker Compose is missing: neither 'docker compose' nor 'docker-compose' works" >&2
    exit 1
fi
compose="$compose --project-name gearfall --file compose.yml"

if [ $# -eq 0 ]; then
    echo "usage: cluster.sh up | COMMAND OF COMPOSE" >&2
    exit 2
fi
if [ "$*" != up ]; then
    exec $compose "$@"
fi

mkdir -p models
$compose build router
$compose up --detach
rest=$($compose port router 8080)
grpc=$($compose port router 50051)
cat <<END

The cluster starts; \`deploy/compose/cluster.sh ps\` shows how far it is.
REST: http://$rest    gRPC: $grpc

Register the demo's three models and deploy their cascade, once:

  deploy/compose/cluster.sh exec router sh -c 'for m in small medium large; do
      gearfall models register arith-\$m /opt/demo/arith-\$m; done
      gearfall deploy --file /opt/demo/deployment.json'

Then ask:

  curl http://$rest/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "arith", "messages": [{"role": "user", "content": "123456+654321"}]}'
END
