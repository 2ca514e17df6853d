#!/bin/sh
# Makes what a node needs and has not yet: the signing key and the chain, the bus users, the gateway's token.
# Each volume then belongs to the user that uses it, and each service sees its own bus key alone.
# --replace-keys: makes new bus keys for all, in place of those that are there.
set -eu
case $* in
  "" | --replace-keys) ;;
  *) echo "stella-init: unknown: $*; allowed: --replace-keys, or nothing" >&2; exit 2 ;;
esac
umask 077
user=10001:10001

chown "$user" /var/lib/stellaops /var/lib/stellaops/state
chmod 0755 /var/lib/stellaops
chmod 0700 /var/lib/stellaops/state
made=$(setpriv --reuid 10001 --regid 10001 --clear-groups stella signals init)
printf '%s\n' "$made" | grep -v '^Next: '

# With a folder of certificates the bus speaks TLS, and asks clients for theirs.
tls=${STELLA_BUS_TLS:+--tls-certificate $STELLA_BUS_TLS/tls.crt --tls-key $STELLA_BUS_TLS/tls.key --tls-ca $STELLA_BUS_TLS/ca.crt}
# The account files stay beside the server's configuration, so that the next run finds them.
stella signals bus-config --directory /init/nats --listen "${STELLA_BUS_LISTEN:-0.0.0.0:4222}" --monitor 127.0.0.1:8222 \
  --store-directory /etc/nats/jetstream $tls "$@" >/dev/null
chown -R "$user" /init/nats

# give SERVICE OWNER FOLDER
give() {
  install -m 0600 -o "${2%:*}" -g "${2#*:}" "/init/nats/$1.json" "$3/bus.json"
  chown "$2" "$3"
  chmod 0700 "$3"
}
give collector 0:0 /init/collector
give enricher 0:0 /init/enricher
give gateway "$user" /init/gateway
give signer "$user" /var/lib/stellaops/state

# secret FILE, where its volume is mounted
secret() {
  [ -d "${1%/*}" ] || return 0
  [ -s "$1" ] || od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$1"
  chmod 0444 "$1"
  chmod 0755 "${1%/*}"
}
# Whoever reads the gateway or the evidence on the bus: Prometheus, and the command.
secret /init/token/token
secret /init/grafana/password
if [ -d /init/token ]; then
  install -m 0400 -o "${user%:*}" -g "${user#*:}" /init/nats/reader.json /init/token/reader.json
fi

# Where a kubelet looks for profiles.
if [ -d /init/seccomp ]; then
  install -m 0444 /opt/stella/share/seccomp/collector.json /init/seccomp/collector.json
fi
