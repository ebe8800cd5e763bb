package server

import (
	"bufio"
	"context"
	"io"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/instar-image/instar/metadata"
)

// logBuffer collects lines, so that a request does not wait for a disk. What
// it holds is written when it is full, a quarter of a second after the first
// line, and at the end; a kill loses at most that.
type logBuffer struct {
	mu   sync.Mutex
	w    *bufio.Writer
	wake chan struct{}
}

const logDelay = 250 * time.Millisecond

func newLogBuffer(w io.Writer) *logBuffer {
	return &logBuffer{w: bufio.NewWriterSize(w, 64<<10), wake: make(chan struct{}, 1)}
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	first := b.w.Buffered() == 0
	n, err := b.w.Write(p)
	b.mu.Unlock()
	if first {
		select {
		case b.wake <- struct{}{}:
		default:
		}
	}
	return n, err
}

func (b *logBuffer) flush() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.w.Flush()
}

// run flushes until ctx ends, and then once more.
func (b *logBuffer) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return b.flush()
		case <-b.wake:
		}
		select {
		case <-ctx.Done():
			return b.flush()
		case <-time.After(logDelay):
		}
		if err := b.flush(); err != nil {
			return err
		}
	}
}

// accessLog writes a line of JSON for every request.
type accessLog struct{ log zerolog.Logger }

func (a accessLog) Request(q *metadata.Request) {
	level := zerolog.InfoLevel
	switch {
	case q.Status >= 500:
		level = zerolog.ErrorLevel
	case q.Status == 401 || q.Status == 403 || q.Status == 421 || q.Status == 429 || q.Instance == "":
		level = zerolog.WarnLevel
	}
	e := a.log.WithLevel(level).Time("time", q.Start)
	if q.Instance != "" {
		e = e.Str("instance", q.Instance)
	}
	var buf [64]byte
	e = e.Bytes("from", q.Caller.AppendTo(buf[:0]))
	if q.Listener != "" {
		e = e.Str("listener", q.Listener)
	}
	e = e.Str("method", q.Method).Str("path", q.Path).Int("status", q.Status).Int("bytes", q.Bytes).
		Int64("us", q.Duration.Microseconds())
	if q.Token != "" {
		e = e.Str("token", q.Token)
	}
	if q.Note != "" {
		e = e.Str("note", q.Note)
	}
	e.Send()
}

// reporters tells several.
type reporters []metadata.Reporter

func (r reporters) Request(q *metadata.Request) {
	for _, one := range r {
		one.Request(q)
	}
}
