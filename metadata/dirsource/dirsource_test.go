package dirsource

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func write(t *testing.T, path, text string) {
	t.Helper()
	tmp := filepath.Join(filepath.Dir(path), ".tmp")
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func record(n int, more string) string {
	return fmt.Sprintf("instance-id: i-%d\ncaller: {addresses: [10.0.0.%d]}\n%s", n, n, more)
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	data := make([]byte, 16384)
	for i := range data {
		data[i] = byte(i * 7)
	}
	if err := os.WriteFile(filepath.Join(dir, "blob"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "a.yaml"), record(1, "user-data-file: blob\n"))
	write(t, filepath.Join(dir, "b.yml"), record(2, ""))
	write(t, filepath.Join(dir, "c.yaml~"), "not: read")
	write(t, filepath.Join(dir, ".d.yaml"), "not: read")
	d, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if ids := d.Instances().IDs(); strings.Join(ids, " ") != "i-1 i-2" {
		t.Errorf("instances %v", ids)
	}
	if !bytes.Equal(d.Instances().Get("i-1").UserData, data) {
		t.Error("the user data file was not read byte for byte")
	}
}

// TestProblems gives directories that must be refused, with the file named.
func TestProblems(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  []string
	}{
		{"two files", map[string]string{"a.yaml": "instance-id: i-1\nx: y\n", "b.yaml": "instance-id: /\n"}, []string{"a.yaml:2: ", "b.yaml:1: instance-id"}},
		{"same id", map[string]string{"a.yaml": record(1, ""), "b.yaml": record(1, "")}, []string{`"i-1"`}},
		{"no such user data", map[string]string{"a.yaml": record(1, "user-data-file: none\n")}, []string{"a.yaml:3: user-data-file", "none"}},
		{"much user data", map[string]string{"a.yaml": record(1, "user-data-file: big\n"), "big": strings.Repeat("x", 16385)}, []string{"a.yaml:3: user-data-file", "16384"}},
		{"user data twice", map[string]string{"a.yaml": record(1, "user-data-file: x\nuser-data: y\n"), "x": ""}, []string{"a.yaml:3: user-data-file"}},
	} {
		dir := t.TempDir()
		for name, text := range c.files {
			write(t, filepath.Join(dir, name), text)
		}
		_, err := Open(dir)
		if err == nil {
			t.Errorf("%s: no error", c.name)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q, want %q in it", c.name, err, w)
			}
		}
	}
	if _, err := Open(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("no error for a directory that is not there")
	}
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "a.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a FIFO: %v", err)
	}
}

// TestWatch follows changes, keeps the last good set, and keeps the records
// of instances that did not change.
func TestWatch(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	a, data := filepath.Join(dir, "a.yaml"), filepath.Join(elsewhere, "data")
	write(t, a, record(1, "hostname: one\n"))
	write(t, data, "first")
	write(t, filepath.Join(dir, "z.yaml"), record(9, "user-data-file: "+data+"\n"))
	d, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	results := make(chan error, 100)
	done := make(chan error)
	go func() { done <- d.Watch(ctx, func(err error) { results <- err }) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	// until waits for a reload after which cond holds.
	until := func(what string, cond func(err error) bool) {
		t.Helper()
		limit := time.After(2 * time.Minute)
		for {
			select {
			case err := <-results:
				if cond(err) {
					return
				}
			case <-limit:
				t.Fatalf("no reload after which %s", what)
			}
		}
	}
	until("all is well", func(err error) bool { return err == nil })
	nine := d.Instances().Get("i-9")

	write(t, a, record(1, "hostname: two\n"))
	until("the new hostname is there", func(error) bool { return d.Instances().Get("i-1").Hostname == "two" })
	if d.Instances().Get("i-9") != nine {
		t.Error("an unchanged record was read again")
	}
	write(t, a, record(1, "hostnam: three\n"))
	until("the bad file is named", func(err error) bool { return err != nil && strings.Contains(err.Error(), "a.yaml:3: ") })
	if d.Instances().Get("i-1").Hostname != "two" {
		t.Error("the last good set was given up")
	}
	write(t, filepath.Join(dir, "b.yaml"), record(1, ""))
	write(t, a, record(2, ""))
	until("the address moved", func(err error) bool { return err == nil && d.Instances().Get("i-2") != nil })
	write(t, data, "second")
	until("the user data is new", func(error) bool { return string(d.Instances().Get("i-9").UserData) == "second" })
	if err := os.Remove(a); err != nil {
		t.Fatal(err)
	}
	until("the instance is gone", func(error) bool { return d.Instances().Get("i-2") == nil })

	// The whole directory swapped at once, as configuration tools do.
	next := filepath.Join(filepath.Dir(dir), "next")
	if err := os.Mkdir(next, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(next, "n.yaml"), record(7, ""))
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, dir); err != nil {
		t.Fatal(err)
	}
	until("the other directory is read", func(error) bool { return d.Instances().Get("i-7") != nil && d.Instances().Len() == 1 })
	write(t, filepath.Join(dir, "m.yaml"), record(8, ""))
	until("the other directory is watched", func(error) bool { return d.Instances().Get("i-8") != nil })
}
