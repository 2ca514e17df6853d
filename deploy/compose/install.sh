#!/bin/sh
# Makes /opt/stella: the packages of some extras, pinned, without the code of the services that are not named.
# install.sh ROOM[,ROOM] EXTRA[,EXTRA]
set -eu
rooms=$1 extras=$2
python3 -m venv --without-pip /opt/stella
/pip/bin/pip --python /opt/stella/bin/python install -q --disable-pip-version-check \
  -c /requirements.lock "$(echo /wheel/*.whl)[$extras]"
for room in collector enricher signer gateway cli; do
  case ",$rooms," in
    *",$room,"*) ;;
    *) rm -rf /opt/stella/lib/python3*/site-packages/stella_$room ;;
  esac
done
case ",$rooms," in *",cli,"*) ;; *) rm -f /opt/stella/bin/stella ;; esac
