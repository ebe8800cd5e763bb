// Package schedule has captures made again and again, by systemd's timers.
//
// In go a name, calendar expressions of systemd's and what is to be captured;
// out come a timer and a service unit, which at those times runs a command that
// starts a task at the agent. The package writes its own units and records, asks
// systemctl and systemd-analyze to take them up and to judge calendars, and
// touches nothing else.
package schedule

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/agent/inject/inroot"
	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
)

// Schedule is captures made again and again.
type Schedule struct {
	Name string `json:"name"`
	// Calendar are systemd's calendar expressions (systemd.time(7)): it is due
	// when one of them is.
	Calendar []string `json:"calendar"`
	// Jitter delays each run by up to so long, by the same every time: machines
	// with one calendar do not all come at once.
	Jitter task.Span `json:"jitter,omitempty"`
	// CatchUp runs once, when the machine starts, if it was due while it was off.
	CatchUp bool         `json:"catch-up"`
	Request task.Request `json:"request"`
}

// Errors that a caller may branch on.
var (
	ErrSchedule = errors.New("invalid schedule")
	ErrExists   = errors.New("there is a schedule of this name")
	ErrNone     = errors.New("no such schedule")
)

const (
	recordDir  = "/etc/instar/schedules"
	unitDir    = "/etc/systemd/system"
	stampDir   = "/var/lib/systemd/timers"
	maxJitter  = 7 * 24 * time.Hour
	maxRecords = 1000
)

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// Check says why s cannot be meant; whether its calendar can, systemd says.
func (s *Schedule) Check() error {
	if !namePattern.MatchString(s.Name) {
		return fmt.Errorf("%w: name %q: up to 64 letters, digits and . _ -, a letter or digit first", ErrSchedule, s.Name)
	}
	if len(s.Calendar) == 0 || len(s.Calendar) > 16 {
		return fmt.Errorf("%w %s: one to 16 calendar expressions", ErrSchedule, s.Name)
	}
	for _, c := range s.Calendar {
		if c == "" || len(c) > 256 || strings.IndexFunc(c, func(r rune) bool { return r < ' ' || r > '~' }) >= 0 {
			return fmt.Errorf("%w %s: %q is no calendar expression", ErrSchedule, s.Name, c)
		}
	}
	if s.Jitter < 0 || time.Duration(s.Jitter) > maxJitter {
		return fmt.Errorf("%w %s: jitter %v is not between 0 and %v", ErrSchedule, s.Name, time.Duration(s.Jitter), maxJitter)
	}
	if s.Request.ClientToken != "" {
		return fmt.Errorf("%w %s: each run has a client token of its own", ErrSchedule, s.Name)
	}
	return s.Request.Check()
}

// Timer and Service are the names of a schedule's units.
func Timer(name string) string   { return "instar-schedule-" + name + ".timer" }
func Service(name string) string { return "instar-schedule-" + name + ".service" }

// Units are the texts of a schedule's units; program is the absolute path of
// the instar that its service runs.
func (s *Schedule) Units(program string) (timer, service string) {
	var b strings.Builder
	fmt.Fprintf(&b, "[Unit]\nDescription=Captures by the schedule %s (Instar)\nDocumentation=man:instar-agent-schedule(1)\n\n[Timer]\n", s.Name)
	for _, c := range s.Calendar {
		fmt.Fprintf(&b, "OnCalendar=%s\n", strings.ReplaceAll(c, "%", "%%"))
	}
	if s.CatchUp {
		b.WriteString("Persistent=yes\n")
	}
	if s.Jitter > 0 {
		fmt.Fprintf(&b, "RandomizedDelaySec=%d\nFixedRandomDelay=yes\n", int64(time.Duration(s.Jitter).Seconds()))
	}
	b.WriteString("\n[Install]\nWantedBy=timers.target\n")
	// A run that finds no agent is tried again for half an hour: 61 times 30 s are
	// within the interval, and a schedule of every minute does not come to its limit.
	service = fmt.Sprintf(`[Unit]
Description=A capture by the schedule %s (Instar)
Documentation=man:instar-agent-schedule(1)
Wants=instar-agent.socket
After=instar-agent.socket instar-agent.service network-online.target
StartLimitIntervalSec=2400
StartLimitBurst=61

[Service]
Type=oneshot
ExecStart=%s agent schedule trigger %s
Restart=on-failure
RestartSec=30
TimeoutStartSec=120
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateNetwork=yes
CapabilityBoundingSet=
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
`, s.Name, systemd.Quote(program), s.Name)
	return b.String(), service
}

// Systemd is what schedules need of systemd.
type Systemd interface {
	// Calendar says when an expression is due next, as systemd prints it, or
	// what is wrong with it.
	Calendar(ctx context.Context, expression string, runs int) ([]string, error)
	// Reload has systemd read its units again.
	Reload(ctx context.Context) error
	// Enable enables and starts a unit, Disable undoes both.
	Enable(ctx context.Context, unit string) error
	Disable(ctx context.Context, unit string) error
	// Start starts a service and waits until it has run.
	Start(ctx context.Context, unit string) error
	// Times are when a timer is due next and was last; zero if never.
	Times(ctx context.Context, timer string) (next, last time.Time, err error)
}

// Manager keeps the schedules of a machine.
type Manager struct {
	Root    string // "": the running system's
	Program string // instar's path, as the services start it
	Systemd Systemd
}

func (m *Manager) open() (*inroot.Root, error) {
	root := m.Root
	if root == "" {
		root = "/"
	}
	return inroot.Open(root)
}

func record(name string) string { return recordDir + "/" + name + ".json" }

// Add makes a schedule, or with replace puts it in place of one of that name.
// After an error it may be added again.
func (m *Manager) Add(ctx context.Context, s Schedule, replace bool) error {
	s.Request.Schedule = s.Name
	if err := s.Check(); err != nil {
		return err
	}
	for _, c := range s.Calendar {
		if _, err := m.Systemd.Calendar(ctx, c, 1); err != nil {
			return fmt.Errorf("%w %s: %w", ErrSchedule, s.Name, err)
		}
	}
	if err := systemd.CheckProgram(m.Program); err != nil {
		return fmt.Errorf("adding schedule %s: %w", s.Name, err)
	}
	r, err := m.open()
	if err != nil {
		return err
	}
	defer r.Close()
	if !replace && r.Exists(record(s.Name)) {
		return fmt.Errorf("%w: %s", ErrExists, s.Name)
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	timer, service := s.Units(m.Program)
	if err := errors.Join(r.Mkdir(recordDir, 0o755), r.Mkdir(unitDir, 0o755)); err != nil {
		return fmt.Errorf("adding schedule %s: %w", s.Name, err)
	}
	for _, f := range []struct{ name, text string }{
		{record(s.Name), string(data) + "\n"},
		{unitDir + "/" + Service(s.Name), service},
		{unitDir + "/" + Timer(s.Name), timer},
	} {
		if err := r.WriteFile(f.name, []byte(f.text), 0o644); err != nil {
			return fmt.Errorf("adding schedule %s: %w", s.Name, err)
		}
	}
	err = m.Systemd.Reload(ctx)
	if err == nil && replace {
		// A timer that runs goes on with what it read: it is started anew.
		err = m.Systemd.Disable(ctx, Timer(s.Name))
	}
	if err == nil {
		err = m.Systemd.Enable(ctx, Timer(s.Name))
	}
	if err != nil {
		return fmt.Errorf("adding schedule %s: its units are written: %w", s.Name, err)
	}
	return nil
}

// Get reads a schedule.
func (m *Manager) Get(name string) (*Schedule, error) {
	r, err := m.open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return get(r, name)
}

func get(r *inroot.Root, name string) (*Schedule, error) {
	if !namePattern.MatchString(name) {
		return nil, fmt.Errorf("%w: %q", ErrNone, name)
	}
	data, err := r.ReadFile(record(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNone, name)
	}
	if err != nil {
		return nil, err
	}
	s, err := parse(data)
	if err == nil && s.Name != name {
		err = fmt.Errorf("it says that it is %q", s.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("reading schedule %s: %w", name, err)
	}
	return s, nil
}

func parse(data []byte) (*Schedule, error) {
	var s Schedule
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return nil, err
	}
	if dec.More() {
		return nil, errors.New("more than one document")
	}
	return &s, s.Check()
}

// List reads all schedules, by name. Those that cannot be read are named in
// the error beside the others.
func (m *Manager) List() ([]Schedule, error) {
	r, err := m.open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	dir, err := r.OpenDir(recordDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing schedules: %w", err)
	}
	defer dir.Close()
	files, err := dir.Readdirnames(maxRecords)
	if err != nil && len(files) == 0 {
		return nil, nil // an empty directory
	}
	slices.Sort(files)
	var all []Schedule
	var errs []error
	for _, f := range files {
		name, ok := strings.CutSuffix(f, ".json")
		if !ok || !namePattern.MatchString(name) {
			continue
		}
		s, err := get(r, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, *s)
	}
	return all, errors.Join(errs...)
}

// Remove ends a schedule; captures that run go on. It may be run again after
// any failure.
func (m *Manager) Remove(ctx context.Context, name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("%w: %q", ErrNone, name)
	}
	r, err := m.open()
	if err != nil {
		return err
	}
	defer r.Close()
	timer := unitDir + "/" + Timer(name)
	if !r.Exists(record(name)) && !r.Exists(timer) {
		return fmt.Errorf("%w: %s", ErrNone, name)
	}
	if r.Exists(timer) {
		if err := m.Systemd.Disable(ctx, Timer(name)); err != nil {
			return fmt.Errorf("removing schedule %s: %w", name, err)
		}
	}
	// The stamp would have a later schedule of this name catch up on this one's runs.
	stamp := filepath.Join(stampDir, "stamp-"+Timer(name))
	// The record goes last: as long as it is there, Remove can be run again.
	for _, f := range []string{timer, unitDir + "/" + Service(name), stamp, record(name)} {
		if err := r.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("removing schedule %s: %w", name, err)
		}
	}
	return m.Systemd.Reload(ctx)
}

// RunNow runs a schedule's service once, whenever it is due.
func (m *Manager) RunNow(ctx context.Context, name string) error {
	if _, err := m.Get(name); err != nil {
		return err
	}
	if err := m.Systemd.Start(ctx, Service(name)); err != nil {
		return fmt.Errorf("running schedule %s: %w", name, err)
	}
	return nil
}
