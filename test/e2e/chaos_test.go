package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
)

// outside is in files that no capture of the tree may reach.
const outside = "MARKER-OF-WHAT-IS-OUTSIDE"

// TestChaos captures a tree while four writers create, grow, truncate, rewrite,
// rename and remove files, replace directories by symbolic links that lead out,
// files by FIFOs, and take all permissions away. Every image must be sound; each
// file in it holds one version that existed, or was named; nothing from outside
// is in it. Five captures; ten minutes of them if $INSTAR_EVIDENCE is set.
func TestChaos(t *testing.T) {
	i := instar.New(t)
	base := loopfs.Make(t, "ext4", 1<<30)
	root, away := mkdir(t, base, "root"), mkdir(t, base, "away")
	if err := os.WriteFile(filepath.Join(away, "file"), []byte(strings.Repeat(outside, 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	t.Cleanup(func() { stop(); writers.Wait() })
	for n := range 4 {
		w := &vandal{root: mkdir(t, root, fmt.Sprint("w", n)), away: away, rand: rand.New(rand.NewPCG(uint64(n), 7))}
		for range 300 {
			w.step()
		}
		writers.Go(func() {
			for ctx.Err() == nil {
				w.step()
			}
		})
	}
	until := time.Now()
	if evidence.Wanted() {
		until = until.Add(10 * time.Minute)
	}
	captures, named, kept := 0, 0, 0
	for captures < 5 || time.Now().Before(until) {
		captures++
		out, back := t.TempDir(), t.TempDir()
		r := i.Run(t, vol(i, root, "-p", "c", "-d", out)...)
		if r.Code != instar.OK && r.Code != instar.Changed {
			t.Fatalf("capture %d: %s", captures, r)
		}
		i.Want(t, instar.OK, "unbundle", "-m", out+"/c.manifest.xml", "-s", out, "-k", i.Keys.UserKey, "-d", back)
		image := filepath.Join(back, "c")
		fsck(t, image)
		if found := search(t, image, map[string]string{"outside": outside}); found["outside"] {
			t.Fatalf("capture %d holds what is outside the tree", captures)
		}
		mnt := loopfs.Mount(t, image, "ro")
		changed := namedInodes(t, mnt, r.Stderr)
		for path, data := range files(t, mnt) {
			switch {
			case changed[inode(t, filepath.Join(mnt, path))]:
				named++
			case !whole(data):
				t.Errorf("capture %d: %s is no version that existed, and was not named: %d bytes, %.80q", captures, path, len(data), data)
			default:
				kept++
			}
		}
		loopfs.Unmount(t, mnt)
		if err := os.RemoveAll(back); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	if kept == 0 {
		t.Error("no file was captured unharmed")
	}
	t.Logf("%d captures: %d files as they were, %d named as changed", captures, kept, named)
}

// namedInodes are the files of the image whose names, one of them at least, are
// among the warnings.
func namedInodes(t testing.TB, mnt, warnings string) map[uint64]bool {
	t.Helper()
	out := map[uint64]bool{}
	for line := range strings.Lines(warnings) {
		_, rest, ok := strings.Cut(line, "warning: ")
		path, _, ok2 := strings.Cut(rest, ": ")
		if !ok || !ok2 {
			continue
		}
		if _, err := os.Lstat(filepath.Join(mnt, path)); err == nil {
			out[inode(t, filepath.Join(mnt, path))] = true
		}
	}
	return out
}

func inode(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// record is a version of a file: lines of 64 bytes, all with the version and
// their number, so that a mixture or a piece shows.
func record(version uint64, lines int) string {
	return strings.Repeat(fmt.Sprintf("%-63s\n", fmt.Sprintf("%d %d", version, lines)), lines)
}

func whole(data string) bool {
	var version uint64
	var lines int
	if data == "" {
		return true
	}
	if _, err := fmt.Sscanf(data, "%d %d", &version, &lines); err != nil {
		return false
	}
	return data == record(version, lines)
}

// vandal changes the files below a directory of its own.
type vandal struct {
	root, away string
	rand       *rand.Rand
	version    uint64
}

func (v *vandal) path() string {
	return filepath.Join(v.root, fmt.Sprint("d", v.rand.IntN(8)), fmt.Sprint("f", v.rand.IntN(40)))
}

// step does one thing. That it may fail, since the things undo each other, is
// the point: errors do not matter.
func (v *vandal) step() {
	v.version++
	content := []byte(record(v.version, 1+v.rand.IntN(2000)))
	p := v.path()
	_ = os.Mkdir(filepath.Dir(p), 0o755)
	switch v.rand.IntN(12) {
	case 0, 1, 2: // create, or replace by another inode
		_ = os.WriteFile(p+".new", content, 0o644)
		_ = os.Rename(p+".new", p)
	case 3: // rewrite in place, by one call and without another size: no moment between is a version
		if f, err := os.OpenFile(p, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0); err == nil {
			if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
				_, _ = f.WriteAt([]byte(record(v.version, int(info.Size()/64))), 0)
			}
			_ = f.Close()
		}
	case 4:
		_ = os.Truncate(p, 0)
	case 5:
		_ = os.Rename(p, v.path())
	case 6:
		_ = os.Remove(p)
	case 7: // a directory becomes a link that leads out, and back again
		d := filepath.Dir(p)
		_ = os.Rename(d, d+".was")
		_ = os.Symlink(v.away, d)
		_ = os.Remove(d)
		_ = os.Rename(d+".was", d)
	case 8: // a file becomes a link that leads out
		_ = os.Remove(p)
		_ = os.Symlink(filepath.Join(v.away, "file"), p)
	case 9: // a file becomes a FIFO
		_ = os.Remove(p)
		_ = unix.Mkfifo(p, 0o600)
	case 10:
		_ = os.Chmod(p, 0)
	case 11:
		_ = os.Link(p, v.path())
	}
}
