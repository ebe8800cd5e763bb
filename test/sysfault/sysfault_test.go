package sysfault_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/sysfault"
)

func TestMain(m *testing.M) {
	sysfault.Helper()
	os.Exit(m.Run())
}

// script works on two files below $1, and on one elsewhere. The programs are
// separate processes, so threads and children are seen.
const script = `cd "$1"; mkdir d; printf a > d/f; mv d/f d/g; rm d/g; printf x > "$2"; printf done`

func TestCount(t *testing.T) {
	dir, other := t.TempDir(), filepath.Join(t.TempDir(), "x")
	r := sysfault.Run(t, sysfault.Fault{Dir: dir}, nil, "bash", "-ec", script, "bash", dir, other)
	if r.Code != 0 || r.Stdout != "done" || r.Hit {
		t.Fatalf("%+v", r)
	}
	var got []string
	for _, op := range r.Ops {
		got = append(got, op.Call+" "+strings.TrimPrefix(op.Path, dir))
	}
	// bash opens with O_CREAT; mkdir(1), mv(1) and rm(1) may use calls without
	// "at", which static Go programs never do: those are not required here.
	for _, want := range []string{"openat /d/f", "write /d/f"} {
		if !slices.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
	for _, op := range r.Ops {
		if !strings.HasPrefix(op.Path, dir) {
			t.Errorf("an operation elsewhere counted: %v", op)
		}
	}
}

func TestKill(t *testing.T) {
	points := 0
	for at := 1; ; at++ {
		dir, other := t.TempDir(), filepath.Join(t.TempDir(), "x")
		r := sysfault.Run(t, sysfault.Fault{Dir: dir, At: at}, nil, "bash", "-ec", script, "bash", dir, other)
		if !r.Hit {
			if r.Code != 0 {
				t.Fatalf("no fault, but %+v", r)
			}
			break
		}
		points++
		if r.Code == 0 || r.Stdout == "done" {
			t.Fatalf("killed at %d, but %+v", at, r)
		}
		if data, err := os.ReadFile(filepath.Join(dir, "d/f")); err == nil && r.Ops[at-1].Call == "write" && len(data) != 0 {
			t.Fatalf("killed before the write, but the file holds %q", data)
		}
	}
	if points < 2 {
		t.Fatalf("%d points", points)
	}
}

func TestErrno(t *testing.T) {
	dir, other := t.TempDir(), filepath.Join(t.TempDir(), "x")
	f := sysfault.Fault{
		Dir: dir, At: 1, Errno: unix.ENOSPC,
		Only: func(op sysfault.Op) bool { return op.Call == "write" },
	}
	r := sysfault.Run(t, f, nil, "bash", "-ec", script, "bash", dir, other)
	if !r.Hit || r.Code == 0 || !strings.Contains(r.Stderr, "No space left") {
		t.Fatalf("%+v", r)
	}
}
