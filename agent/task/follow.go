package task

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Stage is where in its work a worker is. It decides the state and the
// percentage of a task.
type Stage string

// The stages, in their order.
const (
	Preparing  Stage = "preparing"  // the store and the volume's metadata are read
	Reading    Stage = "reading"    // the volume is read, and stored meanwhile
	Finishing  Stage = "finishing"  // what is left is stored
	Publishing Stage = "publishing" // the image appears
	Tidying    Stage = "tidying"    // published; older images are removed, hooks run
)

// state is the state of a task at that stage.
func (s Stage) state() State {
	switch s {
	case Finishing, Publishing, Tidying:
		return Storing
	}
	return Bundling
}

// base is how many percent are done when the stage begins.
func (s Stage) base() int {
	return map[Stage]int{Reading: 5, Finishing: 90, Publishing: 97, Tidying: 99}[s]
}

// span is how many percent the stage is.
func (s Stage) span() int {
	return map[Stage]int{Preparing: 5, Reading: 85, Finishing: 7, Publishing: 2}[s]
}

// Line is one object of a worker's log: what the command tells with --json,
// and what the worker adds.
type Line struct {
	Type     string `json:"message_type"`
	Stage    Stage  `json:"stage,omitempty"` // of "stage"
	Phase    string `json:"phase,omitempty"` // of "stage" and "progress"
	Done     int64  `json:"bytes_done,omitempty"`
	Total    int64  `json:"bytes_total,omitempty"`
	Rate     int64  `json:"bytes_per_second,omitempty"`
	Left     int64  `json:"seconds_left,omitempty"`
	Message  string `json:"message,omitempty"`
	Path     string `json:"path,omitempty"`
	Quiesced *bool  `json:"quiesced,omitempty"` // of "quiesce"
}

// maxLine bounds a line of a log, in bytes: longer ones are passed over.
const maxLine = 256 << 10

// follower reads a log that grows.
type follower struct {
	path string
	at   int64
	rest []byte
	skip bool // within a line that is too long
}

// next gives what was added since, line by line, to f. The last line is
// given when it is whole.
func (w *follower) next(f func(Line)) error {
	file, err := os.OpenFile(w.path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	if st, err := file.Stat(); err == nil && st.Size() < w.at {
		*w = follower{path: w.path} // it is another one
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := file.ReadAt(buf, w.at)
		w.at += int64(n)
		w.feed(buf[:n], f)
		switch {
		case errors.Is(err, io.EOF), err == nil && n == 0:
			return nil
		case err != nil:
			return err
		}
	}
}

func (w *follower) feed(p []byte, f func(Line)) {
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			if w.skip = w.skip || len(w.rest)+len(p) > maxLine; w.skip {
				w.rest = nil
			} else {
				w.rest = append(w.rest, p...)
			}
			return
		}
		line := append(w.rest, p[:end]...)
		w.rest, p = nil, p[end+1:]
		if w.skip || len(line) > maxLine {
			w.skip = false
			continue
		}
		var l Line
		if json.Unmarshal(line, &l) == nil && l.Type != "" {
			f(l)
		}
	}
}

// take updates a task's progress by a line.
func (t *Task) take(l Line, stage *Stage) {
	p := &t.Progress
	switch l.Type {
	case "stage":
		*stage = l.Stage
		p.Phase, p.Done, p.Total, p.Rate, p.SecondsLeft = l.Phase, 0, l.Total, 0, 0
		t.raise(stage.base())
	case "progress":
		p.Done, p.Rate, p.SecondsLeft = l.Done, l.Rate, l.Left
		if l.Total > 0 {
			p.Total = l.Total
		}
		if p.Total > 0 {
			part := float64(min(max(p.Done, 0), p.Total)) / float64(p.Total)
			t.raise(stage.base() + int(part*float64(stage.span())))
		}
	case "quiesce":
		p.Quiesced = l.Quiesced != nil && *l.Quiesced
	case "warning":
		t.Warnings++
	}
}

// raise moves the percentage forward. 100 is for what is complete.
func (t *Task) raise(percent int) {
	t.Progress.Percent = max(t.Progress.Percent, min(percent, 99))
}

// Text is a line as the agent's own log has it.
func (l Line) Text() string {
	if l.Path != "" && !strings.HasPrefix(l.Message, l.Path) {
		return l.Path + ": " + l.Message
	}
	return l.Message
}
