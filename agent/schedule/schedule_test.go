package schedule

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
)

// fake is a systemd that notes what it is told, and judges calendars for real.
type fake struct {
	Systemctl
	calls []string
	fail  string
}

func (f *fake) call(what string) error {
	f.calls = append(f.calls, what)
	if f.fail != "" && strings.HasPrefix(what, f.fail) {
		return errors.New("systemd is not well")
	}
	return nil
}
func (f *fake) Reload(context.Context) error              { return f.call("reload") }
func (f *fake) Enable(_ context.Context, u string) error  { return f.call("enable " + u) }
func (f *fake) Disable(_ context.Context, u string) error { return f.call("disable " + u) }
func (f *fake) Start(_ context.Context, u string) error   { return f.call("start " + u) }

func nightly() Schedule {
	return Schedule{
		Name: "nightly", Calendar: []string{"Mon..Fri *-*-* 03:00", "*-*-01 12:00:00 Europe/Berlin"}, Jitter: task.Span(30 * time.Minute), CatchUp: true,
		Request: task.Request{Kind: task.CreateImage, Name: "web"},
	}
}

func newManager(t *testing.T) (*Manager, *fake) {
	t.Helper()
	f := &fake{}
	root := t.TempDir()
	for _, d := range []string{"etc", "var/lib/systemd/timers"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return &Manager{Root: root, Program: "/usr/local/bin/instar", Systemd: f}, f
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestSchedule(t *testing.T) {
	m, f := newManager(t)
	s := nightly()
	must(t, m.Add(t.Context(), s, false))
	if want := []string{"reload", "enable instar-schedule-nightly.timer"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %q, want %q", f.calls, want)
	}
	timer, err := os.ReadFile(filepath.Join(m.Root, "etc/systemd/system/instar-schedule-nightly.timer"))
	must(t, err)
	for _, line := range []string{"OnCalendar=Mon..Fri *-*-* 03:00", "OnCalendar=*-*-01 12:00:00 Europe/Berlin", "Persistent=yes", "RandomizedDelaySec=1800", "FixedRandomDelay=yes", "WantedBy=timers.target"} {
		if !strings.Contains(string(timer), "\n"+line+"\n") {
			t.Errorf("the timer lacks %q:\n%s", line, timer)
		}
	}
	if err := m.Add(t.Context(), s, false); !errors.Is(err, ErrExists) {
		t.Errorf("a second of the name: %v", err)
	}
	s.CatchUp, s.Jitter, s.Calendar = false, 0, []string{"daily"}
	f.calls = nil
	must(t, m.Add(t.Context(), s, true))
	if want := []string{"reload", "disable instar-schedule-nightly.timer", "enable instar-schedule-nightly.timer"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %q, want %q", f.calls, want)
	}
	got, err := m.Get("nightly")
	must(t, err)
	if got.CatchUp || got.Request.Schedule != "nightly" || got.Calendar[0] != "daily" {
		t.Errorf("read back: %+v", got)
	}
	must(t, m.RunNow(t.Context(), "nightly"))
	if last := f.calls[len(f.calls)-1]; last != "start instar-schedule-nightly.service" {
		t.Errorf("run-now: %s", last)
	}
	stamp := filepath.Join(m.Root, "var/lib/systemd/timers/stamp-instar-schedule-nightly.timer")
	must(t, os.WriteFile(stamp, nil, 0o644))

	// One that cannot be read does not hide the others, and can be removed.
	must(t, os.WriteFile(filepath.Join(m.Root, "etc/instar/schedules/broken.json"), []byte("{"), 0o644))
	all, err := m.List()
	if len(all) != 1 || err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("list: %v, %v", all, err)
	}
	must(t, m.Remove(t.Context(), "broken"))

	// Removing goes on where it failed.
	f.fail = "disable"
	if err := m.Remove(t.Context(), "nightly"); err == nil {
		t.Error("removed though systemd failed")
	}
	f.fail = "reload"
	if err := m.Remove(t.Context(), "nightly"); err == nil {
		t.Error("removed though systemd failed")
	}
	f.fail = ""
	if err := m.Remove(t.Context(), "nightly"); !errors.Is(err, ErrNone) {
		t.Errorf("removing what is gone: %v", err)
	}
	left, err := exec.Command("find", m.Root, "-type", "f").Output()
	if err != nil || len(left) > 0 {
		t.Errorf("left: %s (%v)", left, err)
	}
	if _, err := m.Get("nightly"); !errors.Is(err, ErrNone) {
		t.Errorf("read after removing: %v", err)
	}
}

func TestBadSchedules(t *testing.T) {
	m, f := newManager(t)
	for _, c := range []struct {
		name  string
		spoil func(*Schedule)
	}{
		{"no calendar", func(s *Schedule) { s.Calendar = nil }},
		{"nonsense", func(s *Schedule) { s.Calendar = []string{"every so often"} }},
		{"an option", func(s *Schedule) { s.Calendar = []string{"--help"} }},
		{"another line", func(s *Schedule) { s.Calendar = []string{"daily\nOnBootSec=1"} }},
		{"path for a name", func(s *Schedule) { s.Name = "../x" }},
		{"no name", func(s *Schedule) { s.Name = "" }},
		{"specifier", func(s *Schedule) { s.Name = "a%b" }},
		{"jitter of years", func(s *Schedule) { s.Jitter = task.Span(10000 * time.Hour) }},
		{"no image", func(s *Schedule) { s.Request.Name = "" }},
		{"one token for all", func(s *Schedule) { s.Request.ClientToken = "x" }},
	} {
		s := nightly()
		c.spoil(&s)
		if err := m.Add(t.Context(), s, false); !errors.Is(err, ErrSchedule) && !errors.Is(err, task.ErrRequest) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if left, _ := os.ReadDir(filepath.Join(m.Root, "etc")); len(left) > 0 || len(f.calls) > 0 {
		t.Errorf("files %v, calls %q of schedules that were refused", left, f.calls)
	}
}

// TestProgram: a path is one word of the unit's, and one that the unit sees.
func TestProgram(t *testing.T) {
	s := nightly()
	if _, service := s.Units("/opt/my tools/100%/instar"); !strings.Contains(service, `ExecStart="/opt/my tools/100%%/instar" agent schedule trigger nightly`+"\n") {
		t.Error(service)
	}
	m, f := newManager(t)
	for _, p := range []string{"/root/instar", "/home/a/bin/instar", "/run/user/0/instar", "/tmp/instar", "/var/tmp/x/instar", "/usr/../tmp/instar"} {
		m.Program = p
		if err := m.Add(t.Context(), s, false); !errors.Is(err, systemd.ErrHidden) {
			t.Errorf("%s: %v", p, err)
		}
	}
	if left, _ := os.ReadDir(filepath.Join(m.Root, "etc")); len(left) > 0 || len(f.calls) > 0 {
		t.Errorf("files %v, calls %q of schedules that were refused", left, f.calls)
	}
	m.Program = "/rooted/tmp/instar"
	must(t, m.Add(t.Context(), s, false))
}

// TestUnitsAreGood has systemd's own judge look at the units.
func TestUnitsAreGood(t *testing.T) {
	dir := t.TempDir()
	s := nightly()
	timer, service := s.Units("/bin/true")
	names := []string{filepath.Join(dir, Timer(s.Name)), filepath.Join(dir, Service(s.Name))}
	for i, text := range []string{timer, service} {
		must(t, os.WriteFile(names[i], []byte(strings.ReplaceAll(text, "Documentation=man:instar-agent-schedule(1)\n", "")), 0o644))
	}
	if out, err := exec.Command("systemd-analyze", append([]string{"verify", "--man=no"}, names...)...).CombinedOutput(); err != nil || strings.Contains(string(out), "instar") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

func TestIterations(t *testing.T) {
	got, err := Systemctl{}.Calendar(t.Context(), "*-*-* 03:00 UTC", 3)
	if err != nil || len(got) != 3 || !strings.HasSuffix(got[0], "03:00:00 UTC") && !strings.Contains(got[0], ":00") {
		t.Errorf("%q, %v", got, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"name":"n","calendar":["daily"],"catch-up":true,"request":{"kind":"create-image","name":"web"}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parse(data)
		if err != nil {
			return
		}
		timer, service := s.Units("/usr/bin/instar")
		for _, line := range strings.Split(timer+service, "\n") {
			if strings.HasPrefix(line, "ExecStart=") && line != "ExecStart=/usr/bin/instar agent schedule trigger "+s.Name {
				t.Errorf("a schedule brings a command: %q", line)
			}
		}
	})
}
