package main

import (
	"fmt"
	"time"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

// reporter shows what a capture reports. It is to be ended.
type reporter struct {
	ui    *ui.Printer
	bar   *ui.Progress
	phase string
	start time.Time
}

// Phase ends the phase before and begins to show another.
func (r *reporter) Phase(name string, total int64) {
	r.end()
	if total > 0 {
		r.ui.Say("%s (%s)", name, ui.Size(total))
	} else {
		r.ui.Say("%s", name)
	}
	r.bar = r.ui.Progress(name, total)
	r.phase, r.start = name, time.Now()
}

// Add counts bytes.
func (r *reporter) Add(n int64) { r.bar.Add(n) }

// Note shows what an operator should know.
func (r *reporter) Note(text string) { r.ui.Say("note: %s", text) }

// Warn shows what is not as it should be.
func (r *reporter) Warn(path, text string) {
	if path == "" {
		r.ui.Warn(text, nil)
		return
	}
	r.ui.Warn(fmt.Sprintf("%s: %s", shown(path), text), ui.Fields{"path": path})
}

func (r *reporter) end() {
	if r.bar == nil {
		return
	}
	r.bar.End()
	r.ui.Debug("done", ui.Fields{"phase": r.phase, "bytes": r.bar.Done(), "took": time.Since(r.start).String()})
	r.bar = nil
}

// shown writes a path as a person can read it, whatever bytes it has.
func shown(path string) string {
	q := fmt.Sprintf("%q", path)
	if q == `"`+path+`"` {
		return path
	}
	return q
}
