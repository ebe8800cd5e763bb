// Package ui says things to whoever runs the program. The rules:
//
//   - results go to stdout, everything else to stderr;
//   - with JSON, each of both is one object a line that has a message_type;
//   - nothing moves unless stderr is a terminal, and meaning is never only in
//     colour; NO_COLOR turns colour off;
//   - a line that reports trouble begins with the program's name, so that it can
//     be told from others in a log;
//   - debug output is structured (zerolog): pretty on a terminal, JSON elsewhere,
//     fields of the journal when stderr is connected to it.
//
// The package writes to the two writers it is given and to the journal's socket.
package ui

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"github.com/rs/zerolog/journald"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Options says how to speak.
type Options struct {
	Stdout, Stderr io.Writer
	Tool           string // the name the program was called by
	JSON           bool
	Quiet          bool // results, warnings and errors only
	Debug          bool
	NoColor        bool
	Journal        string // JOURNAL_STREAM
	// OnProgress is called when something begins whose progress is shown, with
	// its label and its bytes (0: not known); nil for nobody.
	OnProgress func(label string, total int64)
}

// Fields are the further members of a JSON object.
type Fields map[string]any

// Printer speaks. Its methods may be called concurrently.
type Printer struct {
	o        Options
	terminal bool
	journal  bool
	log      zerolog.Logger

	mu       sync.Mutex
	drawn    bool
	warnings int
}

// New returns a Printer.
func New(o Options) *Printer {
	p := &Printer{o: o, log: zerolog.Nop()}
	f, isFile := o.Stderr.(*os.File)
	p.terminal = isFile && term.IsTerminal(int(f.Fd()))
	p.journal = isFile && o.Journal != "" && isJournal(f, o.Journal)
	level := zerolog.InfoLevel
	if o.Debug {
		level = zerolog.DebugLevel
	}
	switch {
	case p.journal && !o.JSON:
		p.log = zerolog.New(journald.NewJournalDWriter()).Level(level)
	case o.Debug && p.terminal && !o.JSON:
		w := zerolog.ConsoleWriter{Out: lineWriter{p}, NoColor: o.NoColor, TimeFormat: time.TimeOnly}
		p.log = zerolog.New(w).Level(level).With().Timestamp().Logger()
	case o.Debug:
		p.log = zerolog.New(lineWriter{p}).Level(level).With().Timestamp().Str("message_type", "debug").Logger()
	}
	return p
}

// isJournal compares stderr with the device and inode systemd(1) announces.
func isJournal(f *os.File, stream string) bool {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false
	}
	return stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// Terminal reports whether stderr is one.
func (p *Printer) Terminal() bool { return p.terminal }

// JSON reports whether output is objects.
func (p *Printer) JSON() bool { return p.o.JSON }

// Log is a structured log: fields of the journal where stderr is connected to
// it, a line with them elsewhere.
func (p *Printer) Log() zerolog.Logger {
	level := zerolog.InfoLevel
	switch {
	case p.o.Debug:
		level = zerolog.DebugLevel
	case p.o.Quiet:
		level = zerolog.WarnLevel
	}
	if p.journal {
		return zerolog.New(journald.NewJournalDWriter()).Level(level)
	}
	return zerolog.New(lineWriter{p}).Level(level).With().Timestamp().Logger()
}

// Result prints what the command was asked for: human to stdout, or, with
// JSON, an object of this type. An empty human text prints nothing.
func (p *Printer) Result(messageType, human string, f Fields) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	if p.o.JSON {
		return p.object(p.o.Stdout, messageType, f)
	}
	if human == "" {
		return nil
	}
	_, err := io.WriteString(p.o.Stdout, strings.TrimSuffix(human, "\n")+"\n")
	return err
}

// Say tells what is going on, unless Quiet.
func (p *Printer) Say(format string, args ...any) {
	if p.o.Quiet {
		return
	}
	p.line("status", fmt.Sprintf(format, args...), nil)
}

// Warn tells what is not as it should be. f may be nil.
func (p *Printer) Warn(text string, f Fields) {
	p.mu.Lock()
	p.warnings++
	p.mu.Unlock()
	p.line("warning", text, f)
}

// Warnings is how often Warn was called.
func (p *Printer) Warnings() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.warnings
}

// Error tells why the command failed, its exit code and what may help.
func (p *Printer) Error(err error, code int, hint string) {
	f := Fields{"code": code}
	if hint != "" {
		f["hint"] = hint
	}
	p.line("error", err.Error(), f)
	if hint != "" && !p.o.JSON {
		p.line("hint", hint, nil)
	}
}

// Debug notes a detail with fields.
func (p *Printer) Debug(what string, f Fields) {
	p.log.Debug().Fields(map[string]any(f)).Msg(what)
}

func (p *Printer) line(kind, text string, f Fields) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	switch {
	case p.o.JSON:
		all := Fields{"message": text}
		maps.Copy(all, f)
		_ = p.object(p.o.Stderr, kind, all)
	case p.journal:
		e := map[string]func() *zerolog.Event{"warning": p.log.Warn, "error": p.log.Error}[kind]
		if e == nil {
			e = p.log.Info
		}
		e().Fields(map[string]any(f)).Str("tool", p.o.Tool).Msg(text)
	case kind == "status":
		fmt.Fprintln(p.o.Stderr, text)
	case kind == "hint":
		fmt.Fprintln(p.o.Stderr, text)
	default:
		label := kind
		if p.terminal && !p.o.NoColor {
			label = map[string]string{"warning": "\x1b[33m", "error": "\x1b[31m"}[kind] + kind + "\x1b[0m"
		}
		fmt.Fprintf(p.o.Stderr, "%s: %s: %s\n", p.o.Tool, label, text)
	}
}

func (p *Printer) object(w io.Writer, kind string, f Fields) error {
	all := Fields{"message_type": kind}
	maps.Copy(all, f)
	b, err := json.Marshal(all)
	if err != nil {
		return fmt.Errorf("writing a JSON object: %w", err)
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// lineWriter lets the log share stderr with a progress line.
type lineWriter struct{ p *Printer }

func (w lineWriter) Write(b []byte) (int, error) {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	w.p.clear()
	return w.p.o.Stderr.Write(b)
}
