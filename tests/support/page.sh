# What a page of the documentation is carried out with (see tests/readme.rs): one shell for the whole page.
set -euo pipefail
export INFERGATE_LISTEN=127.0.0.1:8080 INFERGATE_ADMIN=127.0.0.1:9090
at=begin
cp config/policy.yaml .shipped
strict=
gateway=
trap 'status=$?; ((status == 0)) || { echo "failed at $at with $status"; tail -n 20 .beside 2>/dev/null | cut -c1-400; }' EXIT

# An answer of 400 or more is a failure, but where a page shows it (`console`).
curl() { command curl ${strict:+--fail-with-body} "$@"; }

# A reader is slower than the journal and the ledger, which follow within a second.
program=$(type -P infergate)
infergate() {
  [[ -z $gateway || $1 != usage && $1 != audit ]] || settled
  "$program" "$@"
}
settled() {
  local level
  for level in 'infergate_journal_places_in_use 0' 'infergate_journal_lag_lines 0' 'infergate_ledger_lag_lines 0'; do
    until command curl -s "http://$INFERGATE_ADMIN/metrics" | grep -x "$level" >/dev/null; do
      kill -0 "$gateway" 2>/dev/null || return 0
      sleep 0.02
    done
  done
}

# begin COMMAND: what a reader would run in another terminal. It is ready when this returns; `$!` is its process.
begin() {
  case "$1 $2" in
    "cargo run") # what it builds is what is tested here; the model server that comes with it has a port of its own
      begin infergate simulate --listen 127.0.0.1:8081 --model sim-small --model sim-large
      begin infergate serve --policy config/policy.yaml
      ;;
    "infergate simulate") answers "$(option --listen "$@")/health" "$@" ;;
    "infergate serve")
      # One that is begun again is the first one's successor.
      [[ -z $gateway || " $* " == *" --listen "* || " $* " == *" --upgrade "* ]] || { kill -INT "$gateway" && wait "$gateway" || true; }
      local admin
      admin=$(option --admin "$@")
      answers "${admin:-$INFERGATE_ADMIN}/readyz" "$@"
      gateway=$!
      ;;
  esac
}

# answers URL COMMAND: begins a command and waits until it answers there.
answers() {
  local url=$1
  "$program" "${@:3}" >>.beside 2>&1 </dev/null &
  until command curl -sf -o /dev/null "http://$url"; do
    kill -0 $! || { echo "it ended: ${*:2}" && return 1; }
    sleep 0.02
  done
}

# option NAME ARGUMENTS: the value of an option, if it is there.
option() {
  local name=$1 previous=
  for argument in "${@:2}"; do
    [[ $previous != "$name" ]] || echo "$argument"
    previous=$argument
  done
}

# written FILE: what the gateway reads is checked, and in force when this returns.
written() {
  case $1 in
    *prices*.yaml) infergate prices check "$1" ;;
    *settings*.yaml) infergate check --kind settings --without-secrets "$1" ;;
    *policy*.yaml) infergate check --without-secrets "$1" ;;
    *) return 0 ;;
  esac
  [[ -z $gateway || $1 != *policy*.yaml ]] || command curl -s -o /dev/null -X POST "http://$INFERGATE_ADMIN/admin/reload"
}
