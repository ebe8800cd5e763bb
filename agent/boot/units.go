package boot

import (
	"fmt"
	"strings"
	"time"

	"github.com/instar-image/instar/agent/systemd"
)

// UnitOptions say what the units start.
type UnitOptions struct {
	Program  string        // absolute path of instar
	Endpoint string        // of the metadata service; "": the default
	User     string        // login user; "": root
	Wait     time.Duration // for metadata, when the machine starts
	Sync     time.Duration // how often keys are compared with metadata; 0: only when the machine starts
}

// confined is what the stages need not do. User data is the machine owner's
// own program: it is not confined. RestrictSUIDSGID= is not among it: it takes
// openat2 away, by which paths are kept inside the root.
const confined = apart + `RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
NoNewPrivileges=yes
CapabilityBoundingSet=%s
`

// apart gives a stage a view of the filesystems of its own. The stage network
// mounts something for all to see: it has none.
const apart = `PrivateTmp=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
`

// Units are the files that run the stages in their order when a machine starts:
// sshd waits for its host keys and for who may log in, nothing waits for user
// data but multi-user.target.
func Units(o UnitOptions) []systemd.UnitFile {
	command := func(stage Stage) string {
		words := []string{o.Program, "agent", "boot", "--stage", string(stage)}
		if o.Endpoint != "" {
			words = append(words, "--metadata", o.Endpoint)
		}
		if o.User != "" {
			words = append(words, "--user", o.User)
		}
		if stage == Network {
			words = append(words, "--wait", o.Wait.String())
		}
		for i, w := range words {
			words[i] = systemd.Quote(w)
		}
		return "ExecStart=" + strings.Join(words, " ") + "\n"
	}
	const console = "StandardOutput=journal+console\nStandardError=journal+console\n"
	unit := func(stage Stage, description, order, service string) systemd.UnitFile {
		return systemd.UnitFile{Name: "instar-boot-" + string(stage) + ".service", Enable: true, Text: "[Unit]\nDescription=" + description + " (Instar)\n" +
			"Documentation=man:instar-agent-boot(1)\n" + order + "\n[Service]\nType=oneshot\nRemainAfterExit=yes\n" + command(stage) + console + service +
			"\n[Install]\nWantedBy=multi-user.target\n"}
	}
	const network = "Requires=instar-boot-network.service\nAfter=instar-boot-network.service\n"
	units := []systemd.UnitFile{
		unit(Network, "Identity of this machine from metadata",
			"Wants=network-online.target\nAfter=network-online.target local-fs.target\nBefore=ssh.service sshd.service\n",
			fmt.Sprintf("TimeoutStartSec=%d\n", int(o.Wait.Seconds())+120)+
				fmt.Sprintf(strings.TrimPrefix(confined, apart), "CAP_SYS_ADMIN CAP_DAC_OVERRIDE CAP_CHOWN CAP_FOWNER")),
		unit(Keys, "SSH keys of this machine from metadata",
			network+"Before=ssh.service sshd.service\n",
			"TimeoutStartSec=120\n"+fmt.Sprintf(confined, keyPowers)),
		unit(UserData, "User data of this machine",
			network+"After=instar-boot-keys.service\n", "KillMode=process\nTimeoutStartSec=infinity\n"),
		unit(Final, "End of this machine's boot",
			network+"After=instar-boot-keys.service instar-boot-userdata.service instar-user-data.service ssh.service sshd.service\n",
			"TimeoutStartSec=120\n"+fmt.Sprintf(confined, "CAP_DAC_OVERRIDE")),
	}
	if o.Sync <= 0 {
		return units
	}
	seconds := int(o.Sync.Seconds())
	return append(units,
		systemd.UnitFile{Name: "instar-keys.service", Text: "[Unit]\nDescription=Keep SSH keys in step with metadata (Instar)\nDocumentation=man:instar-agent-boot(1)\n" +
			"After=instar-boot-keys.service\n\n[Service]\nType=oneshot\n" + command(Keys) + "TimeoutStartSec=120\n" + fmt.Sprintf(confined, keyPowers)},
		systemd.UnitFile{Name: "instar-keys.timer", Enable: true, Text: "[Unit]\nDescription=Keep SSH keys in step with metadata (Instar)\nDocumentation=man:instar-agent-boot(1)\n\n" +
			fmt.Sprintf("[Timer]\nOnActiveSec=%d\nOnUnitInactiveSec=%d\nRandomizedDelaySec=%d\n", seconds, seconds, seconds/5) +
			"\n[Install]\nWantedBy=timers.target\n"},
	)
}

// keyPowers are for becoming the user whose keys are written.
const keyPowers = "CAP_DAC_OVERRIDE CAP_CHOWN CAP_FOWNER CAP_SETUID CAP_SETGID"
