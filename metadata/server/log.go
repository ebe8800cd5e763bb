package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/instar-image/instar/metadata"
)

// logBuffer collects lines, so that a request does not wait for a disk. What
// it holds is written when it is much, a quarter of a second after the first
// line, and at the end; a kill loses at most that. While the disk does not keep
// up, requests wait, so that memory is bounded.
type logBuffer struct {
	w     io.Writer // of run alone
	lines sync.Pool // of *[]byte
	wake  chan struct{}
	full  chan struct{}
	told  func(error) // of a write that fails after one that did not

	mu    sync.Mutex
	taken sync.Cond // buf was taken by run, or run ended
	buf   []byte
	ended bool // nobody writes any more
}

const (
	logDelay = 250 * time.Millisecond
	logMuch  = 64 << 10
	logMost  = 1 << 20
)

func newLogBuffer(w io.Writer, told func(error)) *logBuffer {
	b := &logBuffer{w: w, wake: make(chan struct{}, 1), full: make(chan struct{}, 1), told: told}
	b.taken.L = &b.mu
	b.lines.New = func() any { return new([]byte) }
	return b
}

// line adds the line that appendTo appends to what it is given.
func (b *logBuffer) line(appendTo func([]byte) []byte) {
	line := b.lines.Get().(*[]byte)
	*line = appendTo((*line)[:0])
	b.mu.Lock()
	for len(b.buf)+len(*line) > logMost && !b.ended {
		b.taken.Wait()
	}
	before := len(b.buf)
	if !b.ended {
		b.buf = append(b.buf, *line...)
	}
	after := len(b.buf)
	b.mu.Unlock()
	b.lines.Put(line)
	if before == 0 {
		signal(b.wake)
	}
	if before < logMuch && after >= logMuch {
		signal(b.full)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run writes until ctx ends, and then once more. What a failed write did not
// take is lost; the next is tried all the same.
func (b *logBuffer) run(ctx context.Context) (err error) {
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ended = true
		b.taken.Broadcast()
	}()
	timer := time.NewTimer(logDelay)
	defer timer.Stop()
	var spare []byte
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true
		case <-b.wake:
			timer.Reset(logDelay)
			select {
			case <-ctx.Done():
				done = true
			case <-b.full:
			case <-timer.C:
			}
		}
		b.mu.Lock()
		spare, b.buf = b.buf, spare[:0]
		b.taken.Broadcast()
		b.mu.Unlock()
		if len(spare) == 0 {
			continue
		}
		before := err
		if _, err = b.w.Write(spare); err != nil && before == nil {
			b.told(err)
		}
	}
	return err
}

// accessLog writes a line of JSON for every request, but not for every one of
// those that were too many (429): of these, a few a second for all instances
// together, or an instance could fill the disk as fast as it can ask.
type accessLog struct {
	out   *logBuffer
	stamp atomic.Pointer[stamp] // of the last line: most have the same

	mu      sync.Mutex // covers what follows
	second  int64      // Unix time
	refused int        // lines of 429 in that second
	dropped int        // lines left out since the last one of 429
}

// maxRefused is how many lines of 429 a second has.
const maxRefused = 10

// admit reports whether a request that was too many gets a line, and how many
// before it got none.
func (a *accessLog) admit(now time.Time) (dropped int, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := now.Unix(); s != a.second {
		a.second, a.refused = s, 0
	}
	if a.refused >= maxRefused {
		a.dropped++
		return 0, false
	}
	a.refused++
	dropped, a.dropped = a.dropped, 0
	return dropped, true
}

func (a *accessLog) Request(q *metadata.Request) {
	dropped := 0
	if q.Status == 429 {
		var ok bool
		if dropped, ok = a.admit(q.Start); !ok {
			return
		}
	}
	at := a.stamp.Load()
	if at == nil || at.second != q.Start.Unix() {
		at = newStamp(q.Start)
		a.stamp.Store(at)
	}
	a.out.line(func(b []byte) []byte { return appendRequest(b, q, at.text, dropped) })
}

// stamp is a second as lines have it.
type stamp struct {
	second int64
	text   string
}

func newStamp(t time.Time) *stamp { return &stamp{t.Unix(), t.Format(time.RFC3339)} }

// appendRequest appends the request's line.
func appendRequest(b []byte, q *metadata.Request, at string, dropped int) []byte {
	level := "info"
	switch {
	case q.Status >= 500:
		level = "error"
	case q.Status == 401 || q.Status == 403 || q.Status == 421 || q.Status == 429 || q.Instance == "":
		level = "warn"
	}
	b = append(append(b, `{"level":"`...), level...)
	b = append(append(append(b, `","time":"`...), at...), '"')
	b = appendText(b, "instance", q.Instance)
	var from [64]byte
	b = appendText(b, "from", string(q.Caller.AppendTo(from[:0])))
	b = appendText(b, "listener", q.Listener)
	b = appendText(b, "method", q.Method)
	b = appendText(b, "path", q.Path)
	b = strconv.AppendInt(append(b, `,"status":`...), int64(q.Status), 10)
	b = strconv.AppendInt(append(b, `,"bytes":`...), int64(q.Bytes), 10)
	b = strconv.AppendInt(append(b, `,"us":`...), q.Duration.Microseconds(), 10)
	b = appendText(b, "token", q.Token)
	b = appendText(b, "note", q.Note)
	if dropped > 0 {
		b = strconv.AppendInt(append(b, `,"dropped":`...), int64(dropped), 10)
	}
	return append(b, "}\n"...)
}

// appendText appends a member of an object; none if the text is empty.
func appendText(b []byte, name, text string) []byte {
	if text == "" {
		return b
	}
	b = append(append(append(b, `,"`...), name...), `":`...)
	for i := range len(text) {
		if c := text[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			quoted, err := json.Marshal(text)
			if err != nil { // strings cannot fail to marshal
				quoted = []byte(`""`)
			}
			for _, r := range string(quoted) {
				if r >= 0x7f && r < 0xa0 { // JSON leaves these alone; terminals do not
					b = fmt.Appendf(b, `\u%04x`, r)
				} else {
					b = utf8.AppendRune(b, r)
				}
			}
			return b
		}
	}
	return append(append(append(b, '"'), text...), '"')
}

// reporters tells several.
type reporters []metadata.Reporter

func (r reporters) Request(q *metadata.Request) {
	for _, one := range r {
		one.Request(q)
	}
}
