#!/bin/bash
# What the guest's own service looks at, phase by phase; the test reads the
# lines that begin with CHECK. $METADATA is the address of the metadata server.
exec </dev/null >/dev/ttyS0 2>&1
. /etc/check.conf
state=/var/lib/check
mkdir -p $state
check() {
	local name=$1
	shift
	if "$@" >/tmp/out 2>&1; then
		echo "CHECK ok $name"
	else
		echo "CHECK FAIL $name: $*"
		tail -n 20 /tmp/out
	fi
}
until_() { # for at most five minutes
	local i
	for i in {1..600}; do
		"$@" && return
		sleep 0.5
	done
	return 1
}
not() { ! "$@"; }
pid() { systemctl show -p MainPID --value instar-agent.service; }
another() { local p; p=$(pid) && [[ $p != 0 && $p != "$1" ]] && instar agent ctl status; }
begin() { instar agent ctl start create-image --no-kernel --json "$@" | grep -o 'bun-[0-9a-f]*' | head -n 1; }
task() { instar agent ctl show "$1" | grep -qE "$2"; }
reading() { task "$1" '"percent": [1-9]'; }
tasks() { instar agent ctl list --json | grep "$1" | grep -q "$2"; }

stages() {
	local s
	for s in network keys userdata final; do
		systemctl -q is-active "instar-boot-$s.service" || { journalctl --no-pager -o cat -u 'instar-boot-*' | tail -n 15; return 1; }
	done
}

first() {
	check agent-runs until_ systemctl -q is-active instar-agent.service
	check boot-stages stages
	check hostname test "$(hostname) $(cat /etc/hostname)" = "web-1 web-1"
	check key-injected grep -q laptop /home/admin/.ssh/authorized_keys
	check key-is-the-users test "$(stat -c '%U %a' /home/admin/.ssh/authorized_keys)" = "admin 600"
	check sshd-has-its-keys systemctl -q is-active ssh.service
	cp /etc/ssh/ssh_host_ed25519_key.pub $state/
	check user-data-ran test "$(cat /var/lib/ran)" = x
	check boot-status bash -c 'instar agent boot status | grep -q "^user data *finished"'

	# Metadata withdraws the key; the user's own stays.
	echo "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqIPd7b19kHzxcBjHGZw2E73YQM8XtzNK8VgrXRdpt2 own" >>/home/admin/.ssh/authorized_keys
	curl -sf "$METADATA/test/withdraw"
	check keys-timer systemctl -q is-active instar-keys.timer
	check keys-in-step systemctl start instar-keys.service
	check key-withdrawn not grep -q laptop /home/admin/.ssh/authorized_keys
	check own-key-stays grep -q 'own$' /home/admin/.ssh/authorized_keys

	# A task over the socket; the agent is killed while it goes on.
	local id old
	id=$(begin -n web --store /srv/store --volume /opt/data --stop check-dummy.service)
	instar agent ctl progress "$id" >$state/progress &
	check task-goes-on until_ reading "$id"
	check unit-stands-still not systemctl -q is-active check-dummy.service
	old=$(pid)
	kill -9 "$old"
	check agent-comes-back until_ another "$old"
	check task-completes until_ task "$id" '"state": "complete"'
	check task-was-begun-once test "$(instar agent ctl show "$id" | grep -c '"started"')" = 1
	check unit-runs-again until_ systemctl -q is-active check-dummy.service
	check progress-was-told grep -qE ' [1-9][0-9]?%' $state/progress

	# The worker is killed while a unit stands still for it.
	id=$(begin -n web --store /srv/store --volume /opt/data --full --stop check-dummy.service)
	until_ reading "$id"
	kill -9 "$(systemctl show -p MainPID --value "instar-task-$id.service")"
	local from=$SECONDS
	until_ systemctl -q is-active check-dummy.service
	check unit-runs-again-soon test $((SECONDS - from)) -le 10
	check killed-task-completes until_ task "$id" '"state": "complete"'
	check killed-task-was-begun-again test "$(instar agent ctl show "$id" | grep -c '"started"')" = 2

	# An agent that hangs.
	old=$(pid)
	kill -STOP "$old"
	check watchdog until_ another "$old"
	check watchdog-said bash -c 'journalctl -u instar-agent.service | grep -qi watchdog'

	# The user data's secret is nowhere but where root reads it.
	check journal-is-kept bash -c 'journalctl -o export | grep -qa instar-boot-userdata'
	cp /etc/machine-id $state/
	check secret-is-known grep -rqa 'hun[t]er2' /root/secret
	rm /root/secret
	check no-secret-in-the-journal bash -c '! journalctl -a -o export | grep -qa "hun[t]er2"'
	check no-secret-in-proc bash -c '! cat /proc/[0-9]*/{environ,cmdline} 2>/dev/null | grep -qa "hun[t]er2"'
	check no-secret-readable bash -c '! find /run /tmp /var/tmp /var/log -type f -perm /044 -exec grep -la "hun[t]er2" {} +'

	check timer systemctl -q is-active instar-schedule-nightly.timer
	check schedule-listed bash -c 'instar agent schedule list | grep -q "next: 2027-03-01 03:00Z"'

	# The machine goes down while a capture is made.
	id=$(begin -n web2 --store /srv/store --domain other --volume /opt/data)
	echo "$id" >$state/id
	check second-task-goes-on until_ reading "$id"
	echo second >$state/phase
	echo CHECK end first
	systemctl reboot
}

second() {
	local id
	id=$(<$state/id)
	check agent-runs-again until_ systemctl -q is-active instar-agent.service
	check user-data-ran-once test "$(cat /var/lib/ran)" = x
	check host-key-is-the-same cmp $state/ssh_host_ed25519_key.pub /etc/ssh/ssh_host_ed25519_key.pub
	check machine-id-is-new not cmp $state/machine-id /etc/machine-id
	check interrupted-task-completes until_ task "$id" '"state": "complete"'
	check interrupted-task-was-begun-again test "$(instar agent ctl show "$id" | grep -c '"started"')" = 2
	check catch-up until_ tasks '"schedule":"nightly"' '"state":"complete"'
	check success-hook until_ grep -q '^success create-image etc complete nightly' /var/log/events

	curl -sf "$METADATA/test/spot"
	check notice until_ tasks '"client-token":"spot-terminate-20270302T100200Z"' '"state":"complete"'
	check notice-hook until_ grep -q '^notice spot terminate' /var/log/events
	check retention test "$(instar images list --versions --store /srv/nightly | wc -l)" = 1
	check metrics bash -c 'curl -sf --unix-socket /run/instar/agent.sock http://localhost/metrics | grep -q "^instar_agent_last_success_timestamp_seconds{kind=\"create-image\",name=\"web2\"}"'
	check healthy bash -c 'curl -sf --unix-socket /run/instar/agent.sock http://localhost/healthz | grep -q "\"healthy\":true"'
	check no-secret-in-the-journal-still bash -c '! journalctl -a -o export | grep -qa "hun[t]er2"'
	systemctl stop instar-notices.service
	local rss
	rss=$(sed -n 's/^VmRSS:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$(pid)/status")
	echo "IDLE rss $rss kB"
	check small test "$rss" -le 40960
	check security bash -c 'systemd-analyze security instar-agent.service | tail -n 1'
	systemd-analyze security instar-agent.service | tail -n 1
	echo CHECK end second
	systemctl poweroff
}

case $(cat $state/phase 2>/dev/null) in
second) second ;;
*) first ;;
esac
