package schedule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Systemctl is [Systemd] by its own programs.
type Systemctl struct{}

// call runs one of systemd's programs; its error has the program's words.
func call(ctx context.Context, argv ...string) (string, error) { return callWith(ctx, nil, argv...) }

func callWith(ctx context.Context, env []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(append(cmd.Environ(), "LC_ALL=C.UTF-8", "SYSTEMD_COLORS=0", "SYSTEMD_PAGER="), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(errs.String()); text != "" {
			err = errors.New(strings.ReplaceAll(text, "\n", "; "))
		}
		return "", fmt.Errorf("%s %s: %w", argv[0], argv[1], err)
	}
	return out.String(), nil
}

// Calendar asks systemd-analyze.
func (Systemctl) Calendar(ctx context.Context, expression string, runs int) ([]string, error) {
	cmd := []string{"systemd-analyze", "calendar", "--iterations=" + strconv.Itoa(runs), "--", expression}
	out, err := call(ctx, cmd...)
	if err != nil {
		return nil, err
	}
	return iterations(out), nil
}

// iterations are the times that systemd-analyze prints behind "Next elapse:"
// and "Iter. #2:".
func iterations(out string) []string {
	var times []string
	for line := range strings.Lines(out) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), ":")
		if name = strings.TrimSpace(name); ok && (name == "Next elapse" || strings.HasPrefix(name, "Iter")) {
			times = append(times, strings.TrimSpace(value))
		}
	}
	return times
}

// Reload is systemctl daemon-reload.
func (Systemctl) Reload(ctx context.Context) error {
	_, err := call(ctx, "systemctl", "daemon-reload")
	return err
}

// Enable is systemctl enable --now.
func (Systemctl) Enable(ctx context.Context, unit string) error {
	_, err := call(ctx, "systemctl", "enable", "--now", "--quiet", unit)
	return err
}

// Disable is systemctl disable --now.
func (Systemctl) Disable(ctx context.Context, unit string) error {
	_, err := call(ctx, "systemctl", "disable", "--now", "--quiet", unit)
	return err
}

// Start is systemctl start.
func (Systemctl) Start(ctx context.Context, unit string) error {
	_, err := call(ctx, "systemctl", "start", unit)
	return err
}

// Times asks systemctl show. Systemd prints times as "Sun 2026-11-22 03:00:00 UTC".
func (Systemctl) Times(ctx context.Context, timer string) (next, last time.Time, err error) {
	out, err := callWith(ctx, []string{"TZ=UTC"}, "systemctl", "show", "--property=NextElapseUSecRealtime,LastTriggerUSec", timer)
	if err != nil {
		return next, last, err
	}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		at, err := time.Parse("Mon 2006-01-02 15:04:05 MST", value)
		if err != nil {
			continue // n/a, infinity or empty
		}
		switch name {
		case "NextElapseUSecRealtime":
			next = at
		case "LastTriggerUSec":
			last = at
		}
	}
	return next, last, nil
}

// Offline is [Systemd] for a root directory that no systemd runs in: timers
// are enabled for the system's next start, and nothing can be started.
type Offline struct {
	Systemctl
	Root string
}

// Reload does nothing.
func (Offline) Reload(context.Context) error { return nil }

// Enable is systemctl --root enable.
func (o Offline) Enable(ctx context.Context, unit string) error {
	_, err := call(ctx, "systemctl", "--root="+o.Root, "enable", "--quiet", unit)
	return err
}

// Disable is systemctl --root disable.
func (o Offline) Disable(ctx context.Context, unit string) error {
	_, err := call(ctx, "systemctl", "--root="+o.Root, "disable", "--quiet", unit)
	return err
}

// Start fails.
func (o Offline) Start(context.Context, string) error {
	return fmt.Errorf("no systemd runs in %s", o.Root)
}

// Times knows none.
func (Offline) Times(context.Context, string) (next, last time.Time, err error) {
	return next, last, nil
}
