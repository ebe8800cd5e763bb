package watch

import (
	"strings"

	"github.com/instar-image/instar/agent/systemd"
)

const hooksUnit = `[Unit]
Description=Hooks of the task %i (Instar)
Documentation=man:instar-agent-run(1)

[Service]
Type=oneshot
ExecStart=PROGRAM agent hooks %i
TimeoutStartSec=1h
`

// The hooks are the operator's own programs: nothing is withheld from them, nor
// from what starts them.
const noticesUnit = `[Unit]
Description=Notices of an interruption from metadata (Instar)
Documentation=man:instar-agent-notices(1)
Wants=network-online.target instar-agent.socket
After=network-online.target instar-agent.socket

[Service]
Type=exec
ExecStart=PROGRAM agent notices
Restart=on-failure
RestartSec=10

[Install]
WantedBy=multi-user.target
`

// NoticesUnit is the service that watches for notices.
const NoticesUnit = "instar-notices.service"

// HooksUnit is the service that runs the hooks of a task.
func HooksUnit(id string) string { return "instar-hooks@" + id + ".service" }

// Units are the files for hooks and notices; program is instar's absolute path.
func Units(program string) []systemd.UnitFile {
	program = systemd.Quote(program)
	return []systemd.UnitFile{
		{Name: "instar-hooks@.service", Text: strings.ReplaceAll(hooksUnit, "PROGRAM", program)},
		{Name: NoticesUnit, Text: strings.ReplaceAll(noticesUnit, "PROGRAM", program), Enable: true},
	}
}
