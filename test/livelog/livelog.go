// Package livelog is a log that a test reads while what it tests still writes
// it.
//
// What goes in: writes, of any number of goroutines. What comes out: the text so
// far. It touches nothing.
package livelog

import (
	"bytes"
	"sync"
)

// Log is what was written to it. The zero value is empty; it must not be copied.
type Log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write appends p; it never fails.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String is all that was written so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
