// Package fakesystemd is a system bus with a systemd and a logind on it, for
// tests: units are processes that really run, are really stopped and stand
// still, and whose ExecStopPost really follows. What it cannot show is what
// properties do; it keeps them to be looked at.
package fakesystemd

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	managerPath  = dbus.ObjectPath("/org/freedesktop/systemd1")
	managerIface = "org.freedesktop.systemd1.Manager"
)

// System is the bus and what is on it.
type System struct {
	Address string // of the bus

	t     testing.TB
	conn  *dbus.Conn
	mu    sync.Mutex
	units map[string]*unit
	jobs  uint32
	calls []string
	locks []string // what logind was asked to hold up, still held
}

// unit is a unit: a process, or for units that were only declared a state.
type unit struct {
	props  map[string]dbus.Variant
	cmd    *exec.Cmd // nil if declared
	state  string
	frozen bool
	ended  chan struct{}
}

// Start starts a bus and names it in DBUS_SYSTEM_BUS_ADDRESS for the test and
// what it starts.
func Start(t testing.TB) *System {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "bus.conf")
	text := `<busconfig><type>system</type><listen>unix:path=` + filepath.Join(dir, "bus") + `</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="*"/><allow receive_type="*"/></policy></busconfig>`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+config, "--nofork", "--nopidfile", "--print-address=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting a bus (Debian package dbus-daemon): %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line := make([]byte, 512)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	s := &System{t: t, Address: strings.TrimSpace(string(line[:n])), units: map[string]*unit{}}
	if s.conn, err = dbus.Connect(s.Address, dbus.WithIncomingInterceptor(ownReply)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	unitTree := unitProperties{s}
	for _, err := range []error{
		s.conn.Export(manager{s}, managerPath, managerIface),
		s.conn.ExportSubtree(unitTree, managerPath+"/unit", "org.freedesktop.DBus.Properties"),
		s.conn.Export(login{s}, "/org/freedesktop/login1", "org.freedesktop.login1.Manager"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"org.freedesktop.systemd1", "org.freedesktop.login1"} {
		if _, err := s.conn.RequestName(name, dbus.NameFlagDoNotQueue); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", s.Address)
	return s
}

// stop kills what still runs.
func (s *System) stop() {
	s.mu.Lock()
	var running []*unit
	for _, u := range s.units {
		if u.cmd != nil && u.state == "active" {
			running = append(running, u)
		}
	}
	s.mu.Unlock()
	for _, u := range running {
		_ = unix.Kill(-u.cmd.Process.Pid, unix.SIGKILL)
		<-u.ended
	}
	s.conn.Close()
}

// Declare adds an active unit that is no process.
func (s *System) Declare(names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range names {
		s.units[n] = &unit{state: "active"}
	}
}

// State is a unit's ActiveState, and "frozen" for one that is.
func (s *System) State(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.units[name]
	switch {
	case u == nil:
		return "inactive"
	case u.frozen:
		return "frozen"
	}
	return u.state
}

// PID is the process of a unit that runs, 0 for none.
func (s *System) PID(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.units[name]; u != nil && u.cmd != nil && u.state == "active" {
		return u.cmd.Process.Pid
	}
	return 0
}

// Units are the names of the units there ever were that have a prefix.
func (s *System) Units(prefix string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for n := range s.units {
		if strings.HasPrefix(n, prefix) {
			names = append(names, n)
		}
	}
	return names
}

// Property is a property that a transient unit was given; nil for none.
func (s *System) Property(name, property string) any {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.units[name]; u != nil {
		if v, ok := u.props[property]; ok {
			return v.Value()
		}
	}
	return nil
}

// Calls are what was asked for, in order: "StopUnit app.service".
func (s *System) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.calls...)
}

// Held is what logind is asked to hold up now.
func (s *System) Held() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.locks...)
}

// ownReply marks the calls that their methods answer by reply.
func ownReply(m *dbus.Message) {
	switch member, _ := m.Headers[dbus.FieldMember].Value().(string); member {
	case "StartTransientUnit", "Inhibit":
		m.Flags |= dbus.FlagNoReplyExpected
	}
}

// reply answers a call. When it returns the answer has been sent, with what files
// it has: what anybody sees after that, the caller hears of later.
func (s *System) reply(to dbus.Message, value any) *dbus.Error {
	m := &dbus.Message{Type: dbus.TypeMethodReply, Body: []any{value}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: to.Headers[dbus.FieldSender],
		dbus.FieldReplySerial: dbus.MakeVariant(to.Serial()),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(value)),
	}}
	if call := s.conn.Send(m, nil); call != nil && call.Err != nil {
		return dbus.MakeFailedError(call.Err)
	}
	return nil
}

// call notes what was asked for. The lock is held.
func (s *System) call(name string, what ...string) {
	s.calls = append(s.calls, strings.TrimSpace(name+" "+strings.Join(what, " ")))
}

// job ends a job after do, and says so as systemd does.
func (s *System) job(name string, do func() string) dbus.ObjectPath {
	s.jobs++
	id := s.jobs
	path := dbus.ObjectPath(fmt.Sprintf("%s/job/%d", managerPath, id))
	go func() {
		result := do()
		// The reply with the job's path is on its way before the signal.
		time.Sleep(20 * time.Millisecond)
		_ = s.conn.Emit(managerPath, managerIface+".JobRemoved", id, path, name, result)
	}()
	return path
}

type manager struct{ s *System }

type transient struct {
	Name  string
	Value dbus.Variant
}

func noSuch(name string) *dbus.Error {
	return dbus.NewError("org.freedesktop.systemd1.NoSuchUnit", []any{"Unit " + name + " not loaded."})
}

// StartTransientUnit runs a unit.
func (m manager) StartTransientUnit(msg dbus.Message, name, _ string, props []transient, _ []struct {
	Name  string
	Props []transient
},
) (dbus.ObjectPath, *dbus.Error) {
	s := m.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.call("StartTransientUnit", name)
	if u := s.units[name]; u != nil && u.state == "active" {
		return "", dbus.NewError("org.freedesktop.systemd1.UnitExists", []any{"Unit " + name + " already exists."})
	}
	u := &unit{props: map[string]dbus.Variant{}, state: "active", ended: make(chan struct{})}
	for _, p := range props {
		u.props[p.Name] = p.Value
	}
	argv := command(u.props["ExecStart"])
	if argv == nil {
		return "", dbus.MakeFailedError(fmt.Errorf("no ExecStart"))
	}
	dir, err := os.MkdirTemp("", "unit-")
	if err != nil {
		return "", dbus.MakeFailedError(err)
	}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		return "", dbus.MakeFailedError(err)
	}
	u.cmd = exec.Command(argv[0], argv[1:]...)
	env, _ := u.props["Environment"].Value().([]string)
	u.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "DBUS_SYSTEM_BUS_ADDRESS=" + s.Address, "NOTIFY_SOCKET=" + filepath.Join(dir, "notify")}, env...)
	var said bytes.Buffer
	u.cmd.Stderr = &said
	u.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := u.cmd.Start(); err != nil {
		return "", dbus.MakeFailedError(err)
	}
	s.units[name] = u
	go func() {
		err := u.cmd.Wait()
		if post := command(u.props["ExecStopPost"]); post != nil {
			cmd := exec.Command(post[0], post[1:]...)
			cmd.Env = u.cmd.Env[:2]
			if out, err := cmd.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "%s: ExecStopPost: %v: %s\n", name, err, out)
			}
		}
		if err != nil && said.Len() > 0 {
			fmt.Fprintf(os.Stderr, "%s: %v: %s\n", name, err, said.String())
		}
		s.mu.Lock()
		u.state, u.frozen = "inactive", false
		s.mu.Unlock()
		notify.Close()
		os.RemoveAll(dir)
		close(u.ended)
	}()
	path := s.job(name, func() string {
		buf := make([]byte, 4096)
		for {
			n, err := notify.Read(buf)
			switch {
			case err != nil:
				return "failed"
			case strings.Contains(string(buf[:n]), "READY=1"):
				return "done"
			}
		}
	})
	return path, s.reply(msg, path)
}

// command reads the first command of an ExecStart.
func command(v dbus.Variant) []string {
	all, _ := v.Value().([][]any)
	if len(all) == 0 {
		return nil
	}
	argv, _ := all[0][1].([]string)
	return argv
}

// StartUnit starts a declared unit.
func (m manager) StartUnit(name, _ string) (dbus.ObjectPath, *dbus.Error) {
	s := m.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.call("StartUnit", name)
	u := s.units[name]
	if u == nil {
		return "", noSuch(name)
	}
	return s.job(name, func() string {
		s.mu.Lock()
		defer s.mu.Unlock()
		u.state = "active"
		return "done"
	}), nil
}

// StopUnit stops a unit.
func (m manager) StopUnit(name, _ string) (dbus.ObjectPath, *dbus.Error) {
	s := m.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.call("StopUnit", name)
	u := s.units[name]
	if u == nil {
		return "", noSuch(name)
	}
	return s.job(name, func() string {
		if u.cmd != nil {
			_ = unix.Kill(u.cmd.Process.Pid, unix.SIGTERM)
			<-u.ended
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		u.state = "inactive"
		return "done"
	}), nil
}

// FreezeUnit makes a unit stand still.
func (m manager) FreezeUnit(name string) *dbus.Error { return m.freezer("FreezeUnit", name, true) }

// ThawUnit lets it go on.
func (m manager) ThawUnit(name string) *dbus.Error { return m.freezer("ThawUnit", name, false) }

func (m manager) freezer(call, name string, frozen bool) *dbus.Error {
	s := m.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.call(call, name)
	u := s.units[name]
	if u == nil || u.state != "active" {
		return noSuch(name)
	}
	u.frozen = frozen
	if u.cmd == nil {
		return nil
	}
	sig := unix.SIGCONT
	if frozen {
		sig = unix.SIGSTOP
	}
	if err := unix.Kill(-u.cmd.Process.Pid, sig); err != nil {
		return dbus.MakeFailedError(err)
	}
	return nil
}

// Reload is noted.
func (m manager) Reload() *dbus.Error {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	m.s.call("Reload")
	return nil
}

// unitProperties answer for every unit.
type unitProperties struct{ s *System }

// Get is a property of a unit.
func (p unitProperties) Get(msg dbus.Message, _, property string) (dbus.Variant, *dbus.Error) {
	path, _ := msg.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
	name := unescape(filepath.Base(string(path)))
	state := p.s.State(name)
	switch property {
	case "ActiveState":
		if state == "frozen" {
			state = "active"
		}
		return dbus.MakeVariant(state), nil
	case "FreezerState":
		if state != "frozen" {
			state = "running"
		}
		return dbus.MakeVariant(state), nil
	}
	return dbus.Variant{}, dbus.MakeFailedError(fmt.Errorf("no property %s", property))
}

// unescape undoes systemd's escaping of names in paths: _2e is a dot.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		var c int
		if s[i] == '_' && i+2 < len(s) {
			if _, err := fmt.Sscanf(s[i+1:i+3], "%02x", &c); err == nil {
				b.WriteByte(byte(c))
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

type login struct{ s *System }

// Inhibit gives out a lock that holds until its file is closed.
func (l login) Inhibit(msg dbus.Message, what, who, why, mode string) (dbus.UnixFD, *dbus.Error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	defer w.Close() // the caller has a copy of its own by then
	held := strings.Join([]string{what, who, why, mode}, "|")
	s := l.s
	s.mu.Lock()
	s.call("Inhibit", held)
	s.locks = append(s.locks, held)
	s.mu.Unlock()
	go func() {
		_, _ = r.Read(make([]byte, 1)) // the end of the file: nobody holds it
		r.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		for i, x := range s.locks {
			if x == held {
				s.locks = append(s.locks[:i], s.locks[i+1:]...)
				break
			}
		}
		s.call("released", held)
	}()
	fd := dbus.UnixFD(w.Fd())
	return fd, l.s.reply(msg, fd)
}
