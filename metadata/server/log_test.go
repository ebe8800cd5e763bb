package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/test/livelog"
)

// FuzzLogLine puts what a client chooses into a line: it stays one line of
// JSON, with that in it and nothing else beside.
func FuzzLogLine(f *testing.F) {
	f.Add("GET", "/latest/meta-data/", "")
	f.Add("GET", "/x\",\"status\":200,\"y\":\"", "a\nb")
	f.Add("G\x1b[2J", "/\u009b2J\x7f\u0085\u2028", "\xff\xfe\\")
	f.Fuzz(func(t *testing.T, method, path, note string) {
		q := metadata.Request{Start: time.Unix(1, 0).UTC(), Method: method, Path: path, Note: note, Status: 404, Caller: netip.MustParseAddrPort("[fe80::1%eth0]:80")}
		b := appendRequest(nil, &q, "1970-01-01T00:00:01Z", 0)
		text, ok := strings.CutSuffix(string(b), "\n")
		if !ok || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 }) || !utf8.ValidString(text) {
			t.Fatalf("not one clean line: %q", b)
		}
		var got struct {
			Level, Time, From, Method, Path, Note string
			Status                                int
			Bytes, Us                             *int
		}
		d := json.NewDecoder(strings.NewReader(text))
		d.DisallowUnknownFields()
		if err := d.Decode(&got); err != nil || d.More() {
			t.Fatalf("%q: %v", text, err)
		}
		want := func(s string) string { return strings.ToValidUTF8(s, "") }
		strip := func(s string) string { return strings.ReplaceAll(s, "\ufffd", "") }
		if strip(got.Method) != strip(want(method)) || strip(got.Path) != strip(want(path)) || strip(got.Note) != strip(want(note)) || got.Status != 404 || got.From != "[fe80::1%eth0]:80" || got.Level != "warn" {
			t.Fatalf("%q of %q %q %q", text, method, path, note)
		}
	})
}

// TestLogFlood asks much more often than is allowed: most refusals get no
// line, and the next line says how many did not.
func TestLogFlood(t *testing.T) {
	out := new(livelog.Log)
	buf := newLogBuffer(out, func(err error) { t.Error(err) })
	a := &accessLog{out: buf}
	at := time.Unix(1000, 0)
	for range 5000 {
		a.Request(&metadata.Request{Start: at, Instance: "i-1", Status: 429})
	}
	a.Request(&metadata.Request{Start: at, Instance: "i-2", Status: 200})
	a.Request(&metadata.Request{Start: at.Add(time.Second), Instance: "i-1", Status: 429})
	a.Request(&metadata.Request{Start: at.Add(time.Second), Instance: "i-1", Status: 429})
	end, cancel := context.WithCancel(t.Context())
	cancel()
	if err := buf.run(end); err != nil { // writes what there is
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != maxRefused+3 {
		t.Fatalf("%d lines of 5,003 requests, want %d", len(lines), maxRefused+3)
	}
	dropped := fmt.Sprintf(`"dropped":%d}`, 5000-maxRefused)
	for i, line := range lines {
		if strings.Contains(line, "dropped") != (i == maxRefused+1) {
			t.Errorf("line %d is %s", i, line)
		}
	}
	if !strings.HasSuffix(lines[maxRefused+1], dropped) || !strings.Contains(lines[maxRefused], `"i-2"`) {
		t.Errorf("got %q, want %s", lines[maxRefused:], dropped)
	}
}

// fullDisk takes nothing for a while.
type fullDisk struct {
	livelog.Log
	fail  chan bool // each write asks
	tried chan struct{}
}

func (d *fullDisk) Write(p []byte) (int, error) {
	fail := <-d.fail
	d.tried <- struct{}{}
	if fail {
		return 0, errors.New("the disk is full")
	}
	return d.Log.Write(p)
}

// TestLogDisk has a disk that is slow, then full, then well: lines are never
// more than a mebibyte in memory, the trouble is told of, and the log goes on.
func TestLogDisk(t *testing.T) {
	disk := &fullDisk{fail: make(chan bool), tried: make(chan struct{}, 10)}
	var told []error
	buf := newLogBuffer(disk, func(err error) { told = append(told, err) })
	end, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	var result error
	go func() {
		defer close(ended)
		result = buf.run(end)
	}()
	line := []byte(strings.Repeat("x", 1023) + "\n")
	put := func(n int) {
		for range n {
			buf.line(func(b []byte) []byte { return append(b, line...) })
		}
	}
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() { put(1024) })
	}
	go func() {
		writers.Wait()
		cancel()
	}()
	for i, over := 0, false; !over; i++ { // four mebibytes, of which one is in memory and one on its way at most
		select {
		case disk.fail <- i < 2:
			<-disk.tried
		case <-ended:
			over = true
		}
		buf.mu.Lock()
		if len(buf.buf) > logMost {
			t.Errorf("%d bytes in memory", len(buf.buf))
		}
		buf.mu.Unlock()
	}
	got := disk.String()
	// The first two writes, of a line at least, are lost.
	if len(told) != 1 || result != nil || got == "" || len(got)%1024 != 0 || len(got) > 4<<20-2*len(line) {
		t.Errorf("told %v, ended with %v, %d bytes", told, result, len(got))
	}
	buf.line(func(b []byte) []byte { return append(b, line...) }) // does not wait for nobody
}
