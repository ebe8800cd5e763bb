package systemd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/instar-image/instar/internal/durable"
)

// UnitFile is a file for systemd.
type UnitFile struct {
	Name   string
	Text   string
	Enable bool // its [Install] section is to take effect
}

// Names of the agent's own units.
const (
	AgentService = "instar-agent.service"
	AgentSocket  = "instar-agent.socket"
)

// UnitDir is where an administrator's units are.
const UnitDir = "/etc/systemd/system"

// mark begins every file that [Install] writes, and no other is removed.
const mark = "# Written by \"instar agent install\"; changes belong into a drop-in (systemctl edit).\n"

// AgentUnits are the agent's own units; program is the absolute path of instar.
//
// The service needs no capability: it asks systemd to start what does, and
// systemd obeys root. It sees the whole system read-only.
func AgentUnits(program string) []UnitFile {
	return []UnitFile{
		{Name: AgentSocket, Enable: true, Text: `[Unit]
Description=Socket of the Instar agent
Documentation=man:instar-agent-ctl(1)

[Socket]
ListenStream=/run/instar/agent.sock
# Who connects is asked of the kernel, and what he may do of agent.yaml.
SocketMode=0666
DirectoryMode=0755
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
`},
		{Name: AgentService, Enable: true, Text: `[Unit]
Description=Instar agent: captures of this machine
Documentation=man:instar-agent(1)
Requires=instar-agent.socket
After=instar-agent.socket dbus.service

[Service]
Type=notify
ExecStart=` + Quote(program) + ` agent run
Restart=always
RestartSec=2
WatchdogSec=30
TimeoutStopSec=30
StateDirectory=instar/agent
StateDirectoryMode=0700
Environment=GOMAXPROCS=2

# Captures are units of their own (instar-task-*.service, in instar.slice): what
# reads the whole system is there, and the agent itself needs next to nothing.
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
IPAddressDeny=any
IPAddressAllow=localhost
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
DevicePolicy=closed
KeyringMode=private
UMask=0077

[Install]
WantedBy=multi-user.target
`},
	}
}

// Quote makes one word of a command line of systemd's (systemd.service(5),
// "Command lines"): specifiers and variables in it are none.
func Quote(word string) string {
	word = strings.NewReplacer("%", "%%", "$", "$$", `\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(word)
	if word == "" || strings.ContainsAny(word, " \t'\";\\") {
		return `"` + word + `"`
	}
	return word
}

// ErrHidden is wrapped where units could not see the program they are to run.
var ErrHidden = errors.New("is hidden from the units")

// CheckProgram says why units cannot run a program of this path: they see
// neither homes (ProtectHome=) nor the others' temporary files (PrivateTmp=).
func CheckProgram(program string) error {
	clean := filepath.Clean(program)
	if !filepath.IsAbs(clean) || strings.ContainsAny(clean, "\x00\n") {
		return fmt.Errorf("program %q: give an absolute path", program)
	}
	for _, dir := range []string{"/root", "/home", "/run/user", "/tmp", "/var/tmp"} {
		if strings.HasPrefix(clean, dir+"/") {
			return fmt.Errorf("program %s %w, which see nothing below %s: copy it to /usr/local/bin and use that one", clean, ErrHidden, dir)
		}
	}
	return nil
}

// InstallFiles writes units below a root directory and enables those that are
// to be, as systemctl enable does: by links that the [Install] section asks
// for. A unit of that name that somebody else wrote is an error.
func InstallFiles(root string, units []UnitFile) error {
	dir := filepath.Join(root, UnitDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("installing units: %w", err)
	}
	for _, u := range units { // nothing is written unless all can be
		path := filepath.Join(dir, u.Name)
		if ours, err := written(path); err != nil {
			return fmt.Errorf("installing %s: %w", u.Name, err)
		} else if !ours {
			return fmt.Errorf("installing %s: %s is there, and not from here: remove it, or keep it and do not install: %w", u.Name, path, fs.ErrExist)
		}
	}
	for _, u := range units {
		path := filepath.Join(dir, u.Name)
		if err := durable.Replace(path, 0o644, []byte(mark+u.Text)); err != nil {
			return fmt.Errorf("installing %s: %w", u.Name, err)
		}
		if !u.Enable {
			continue
		}
		for _, target := range wantedBy(u.Text) {
			wants := filepath.Join(dir, target+".wants")
			if err := os.MkdirAll(wants, 0o755); err != nil {
				return fmt.Errorf("enabling %s: %w", u.Name, err)
			}
			link := filepath.Join(wants, u.Name)
			if err := os.Symlink(filepath.Join(UnitDir, u.Name), link); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("enabling %s: %w", u.Name, err)
			}
			if err := durable.SyncDir(wants); err != nil {
				return fmt.Errorf("enabling %s: %w", u.Name, err)
			}
		}
	}
	return durable.SyncDir(dir)
}

// Installed are the names of the units below a root directory that [InstallFiles]
// wrote.
func Installed(root string) ([]string, error) {
	dir := filepath.Join(root, UnitDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking for units: %w", err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "instar-") || !e.Type().IsRegular() {
			continue
		}
		if ours, err := written(filepath.Join(dir, e.Name())); err == nil && ours {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// RemoveFiles removes units that [InstallFiles] wrote, and the links to them.
func RemoveFiles(root string, names []string) error {
	dir := filepath.Join(root, UnitDir)
	var errs []error
	for _, n := range names {
		links, err := filepath.Glob(filepath.Join(dir, "*.wants", n))
		if err != nil {
			errs = append(errs, err)
		}
		for _, path := range append(links, filepath.Join(dir, n)) {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("removing a unit: %w", err))
			}
		}
		for _, l := range links {
			_ = os.Remove(filepath.Dir(l)) // unless others are wanted there
		}
	}
	return errors.Join(append(errs, durable.SyncDir(dir))...)
}

// written reports whether a file may be replaced: it is not there, or ours.
func written(path string) (bool, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil || !st.Mode().IsRegular() {
		return false, err
	}
	data, err := os.ReadFile(path)
	return strings.HasPrefix(string(data), mark), err
}

// wantedBy are the targets of an [Install] section.
func wantedBy(text string) []string {
	var targets []string
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "WantedBy="); ok {
			targets = append(targets, strings.Fields(v)...)
		}
	}
	return targets
}
