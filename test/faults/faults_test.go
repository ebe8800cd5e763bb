// Package faults kills the built program at every operation on files and at
// every request to a store, fails its calls, and fills its disk: nothing that
// was acknowledged may be lost, nothing may dangle, a second run completes.
package faults

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/sysfault"
)

func TestMain(m *testing.M) {
	sysfault.Helper()
	os.Exit(m.Run())
}

// partSize gives the small images of these tests several parts, and in the
// campaigns more, so that there are more points.
func partSize() string {
	if evidence.Wanted() {
		return "4096"
	}
	return "65536"
}

// world is what every run works on: an image, its bundle, a tree, keys.
type world struct {
	*instar.Instar
	image  string // a disk image with holes
	bundle string // a directory with its bundle, named "b"
	tree   string // a directory to capture
	*imaging
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{Instar: instar.New(t), bundle: t.TempDir(), tree: t.TempDir()}
	w.image = filepath.Join(t.TempDir(), "disk.img")
	loopfs.Run(t, "bash", "-ec", `
truncate -s 4M "$1"; head -c 200000 /dev/urandom | dd of="$1" bs=4096 seek=100 conv=notrunc status=none
cd "$2"; mkdir -p etc usr; echo x > etc/hostname; head -c 150000 /dev/urandom > usr/data`, "bash", w.image, w.tree)
	w.Want(t, instar.OK, w.bundleImage(w.bundle)...)
	w.imaging = newImaging(t, w.Instar)
	return w
}

func (w *world) bundleImage(dest string) []string {
	return append([]string{"bundle-image", "-i", w.image, "-p", "b", "-d", dest, "--part-size", partSize()}, w.Bundling()...)
}

// job is a command that makes something in a directory.
type job struct {
	name string
	// prepare puts what the command starts from into dir.
	prepare func(t testing.TB, w *world, dir string)
	args    func(w *world, dir string) []string
	// whole fails the test unless what the command makes is there and right.
	whole func(t testing.TB, w *world, dir string)
	// sound fails the test if dir holds something under a final name that is not
	// right; the command did not complete.
	sound func(t testing.TB, w *world, dir string)
}

func jobs() []job {
	return append(imageJobs(), []job{
		{
			name: "bundle-image",
			args: func(w *world, dir string) []string { return w.bundleImage(dir) },
			whole: func(t testing.TB, w *world, dir string) {
				bundleOpens(t, w, dir, w.image)
			},
			sound: manifestOnlyWhole,
		},
		{
			name: "bundle-vol to a store",
			args: func(w *world, dir string) []string {
				return append([]string{
					"bundle-vol", "-v", w.tree, "--no-filter", "--no-inherit", "--size", "auto", "-p", "b",
					"-b", "file://" + dir + "/store", "--part-size", partSize(),
				}, w.Bundling()...)
			},
			whole: func(t testing.TB, w *world, dir string) { bundleOpens(t, w, dir+"/store", "") },
			sound: func(t testing.TB, w *world, dir string) { manifestOnlyWhole(t, w, dir+"/store") },
		},
		{
			name: "unbundle",
			args: func(w *world, dir string) []string {
				return []string{"unbundle", "-m", w.bundle + "/b.manifest.xml", "-s", w.bundle, "-k", w.Keys.UserKey, "-d", dir}
			},
			whole: func(t testing.TB, w *world, dir string) { same(t, w.image, dir+"/b") },
			sound: func(t testing.TB, w *world, dir string) { absentOrSame(t, w.image, dir+"/b") },
		},
		{
			name: "download-and-unbundle",
			args: func(w *world, dir string) []string {
				return []string{"download-and-unbundle", "-b", "file://" + w.bundle, "-p", "b", "-k", w.Keys.UserKey, "-d", dir + "/image"}
			},
			whole: func(t testing.TB, w *world, dir string) { same(t, w.image, dir+"/image") },
			sound: func(t testing.TB, w *world, dir string) { absentOrSame(t, w.image, dir+"/image") },
		},
		{
			name: "upload-bundle",
			args: func(w *world, dir string) []string {
				return []string{"upload-bundle", "-m", w.bundle + "/b.manifest.xml", "-b", "file://" + dir + "/store"}
			},
			whole: func(t testing.TB, w *world, dir string) { bundleOpens(t, w, dir+"/store", w.image) },
			sound: func(t testing.TB, w *world, dir string) { manifestOnlyWhole(t, w, dir+"/store") },
		},
		{
			name: "download-bundle",
			args: func(w *world, dir string) []string {
				return []string{"download-bundle", "-b", "file://" + w.bundle, "-p", "b", "-d", dir}
			},
			whole: func(t testing.TB, w *world, dir string) { bundleOpens(t, w, dir, w.image) },
			sound: partsWhole,
		},
		{
			name: "migrate-manifest",
			prepare: func(t testing.TB, w *world, dir string) {
				loopfs.Run(t, "cp", "-r", w.bundle+"/.", dir)
			},
			args: func(w *world, dir string) []string {
				return []string{
					"migrate-manifest", "-m", dir + "/b.manifest.xml", "-c", w.Keys.UserCert, "-k", w.Keys.UserKey,
					"--no-mapping", "--kernel", "aki-00000001", "--batch",
				}
			},
			whole: func(t testing.TB, w *world, dir string) {
				bundleOpens(t, w, dir, w.image)
				if m := read(t, dir+"/b.manifest.xml"); !strings.Contains(m, "aki-00000001") {
					t.Error("the manifest has no new kernel")
				}
			},
			// Old or new, it opens at every moment.
			sound: func(t testing.TB, w *world, dir string) {
				t.Helper()
				if _, err := os.Stat(dir + "/b.manifest.xml"); err == nil {
					bundleOpens(t, w, dir, w.image)
				} else {
					same(t, w.bundle+"/b.manifest.xml", dir+"/b.manifest.xml.bak")
				}
			},
		},
		{
			name: "delete-bundle",
			prepare: func(t testing.TB, w *world, dir string) {
				loopfs.Run(t, "cp", "-r", w.bundle+"/.", dir+"/store")
			},
			args: func(w *world, dir string) []string {
				return []string{"delete-bundle", "-b", "file://" + dir + "/store", "-p", "b", "-y", "--batch"}
			},
			whole: func(t testing.TB, w *world, dir string) {
				t.Helper()
				if left := visible(t, dir+"/store"); len(left) > 0 {
					t.Errorf("not deleted: %q", left)
				}
			},
			sound: func(t testing.TB, w *world, dir string) { manifestOnlyWhole(t, w, dir+"/store") },
		},
	}...)
}

// TestKillAtEveryFileOperation kills each command before its first operation on
// files, its second, and so on until it completes; each time it is run again.
func TestKillAtEveryFileOperation(t *testing.T) {
	w := newWorld(t)
	total := 0
	for _, j := range jobs() {
		t.Run(j.name, func(t *testing.T) {
			points := 0
			for at := 1; ; at++ {
				dir := start(t, w, j)
				r := sysfault.Run(t, sysfault.Fault{Dir: dir, At: at}, w.Environ(), w.Program, j.args(w, dir)...)
				if !r.Hit {
					if r.Code != 0 {
						t.Fatalf("without a fault: exit code %d\n%s", r.Code, r.Stderr)
					}
					j.whole(t, w, dir)
					break
				}
				points++
				j.sound(t, w, dir)
				again(t, w, j, dir)
				if t.Failed() {
					t.Fatalf("killed before operation %d, %v", at, r.Ops[at-1])
				}
			}
			t.Logf("%d kill points", points)
			if total += points; points < 3 {
				t.Errorf("only %d operations: the fault does not see them", points)
			}
		})
	}
	t.Logf("%d kill points in all", total)
}

// TestFailureOfEveryFileOperation lets each operation fail once: the command
// says so, leaves nothing that is not whole and no debris; or it completes.
func TestFailureOfEveryFileOperation(t *testing.T) {
	w := newWorld(t)
	errnos := []unix.Errno{unix.EIO, unix.ENOSPC, unix.EDQUOT, unix.EMFILE}
	for _, j := range jobs() {
		t.Run(j.name, func(t *testing.T) {
			points := 0
			for n := 0; ; n++ {
				// In turn; in the long run each at each point.
				at, errno := n+1, errnos[n%len(errnos)]
				if evidence.Wanted() {
					at = n/len(errnos) + 1
				}
				dir := start(t, w, j)
				r := sysfault.Run(t, sysfault.Fault{Dir: dir, At: at, Errno: errno}, w.Environ(), w.Program, j.args(w, dir)...)
				if !r.Hit {
					break
				}
				points++
				judge(t, w, j, dir, r)
				if t.Failed() {
					t.Fatalf("operation %d, %v, failed with %v", at, r.Ops[at-1], errno)
				}
			}
			t.Logf("%d failures", points)
		})
	}
}

// TestDiskFullFromEveryWrite lets all operations that take space fail from one
// on, as a disk does that is full.
func TestDiskFullFromEveryWrite(t *testing.T) {
	w := newWorld(t)
	takesSpace := func(op sysfault.Op) bool {
		switch op.Call {
		case "write", "pwrite", "writev", "pwritev", "openat", "mkdirat", "fallocate", "copy_file_range", "symlinkat", "linkat":
			return true
		}
		return false
	}
	for _, j := range jobs() {
		t.Run(j.name, func(t *testing.T) {
			for at := 1; ; at++ {
				dir := start(t, w, j)
				f := sysfault.Fault{Dir: dir, At: at, From: true, Errno: unix.ENOSPC, Only: takesSpace}
				r := sysfault.Run(t, f, w.Environ(), w.Program, j.args(w, dir)...)
				if !r.Hit {
					break
				}
				judge(t, w, j, dir, r)
				if t.Failed() {
					t.Fatalf("full from operation %d on, %v", at, r.Ops[at-1])
				}
			}
		})
	}
}

// TestSmallDisk runs the commands on real filesystems of every size up to the
// one that suffices.
func TestSmallDisk(t *testing.T) {
	w := newWorld(t)
	for _, j := range jobs() {
		if j.prepare != nil {
			continue // it starts from what would fill the disk
		}
		t.Run(j.name, func(t *testing.T) {
			failed := 0
			for size := int64(16 << 10); ; size += 128 << 10 {
				dir := loopfs.Tmpfs(t, size)
				r := w.Run(t, j.args(w, dir)...)
				if r.Code == 0 {
					j.whole(t, w, dir)
					loopfs.Unmount(t, dir)
					break
				}
				failed++
				if !strings.Contains(r.Stderr, "no space left on device") {
					t.Errorf("%d bytes: does not say that the disk is full: %s", size, r)
				}
				j.sound(t, w, dir)
				nothingHalf(t, dir)
				loopfs.Run(t, "mount", "-o", "remount,size=64m", dir)
				again(t, w, j, dir)
				loopfs.Unmount(t, dir)
				if t.Failed() {
					t.Fatalf("a disk of %d bytes", size)
				}
			}
			if failed == 0 {
				t.Error("every size sufficed")
			}
		})
	}
}

func start(t testing.TB, w *world, j job) string {
	t.Helper()
	dir, err := os.MkdirTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if j.prepare != nil {
		j.prepare(t, w, dir)
	}
	return dir
}

// again runs a command that was stopped once more: it completes.
func again(t testing.TB, w *world, j job, dir string) {
	t.Helper()
	rerun(t, w.Run(t, j.args(w, dir)...))
	j.whole(t, w, dir)
}

// rerun judges the second run of a command that was killed. The first may have
// been complete: then the second may refuse to make what exists, or to delete
// what does not, and the caller finds all as it should be.
func rerun(t testing.TB, r instar.Result) {
	t.Helper()
	if r.Code != 0 && !strings.Contains(r.Stderr, "exist") && !strings.Contains(r.Stderr, "is stored already") {
		t.Errorf("the second run ends with %s", r)
	}
}

// judge looks at how a command took a failing operation.
func judge(t testing.TB, w *world, j job, dir string, r sysfault.Result) {
	t.Helper()
	if strings.Contains(r.Stderr, "panic:") || strings.Contains(r.Stderr, "goroutine ") {
		t.Errorf("it panics: %.2000s", r.Stderr)
	}
	if r.Code == 0 {
		j.whole(t, w, dir)
		return
	}
	if !strings.Contains(r.Stderr, "error: ") {
		t.Errorf("exit code %d without an error line: %q", r.Code, r.Stderr)
	}
	j.sound(t, w, dir)
	// A failed removal leaves what was to be removed.
	if r.Failed.Call != "unlinkat" {
		nothingHalf(t, dir)
	}
	again(t, w, j, dir)
}

// nothingHalf fails the test if temporary files are left.
func nothingHalf(t testing.TB, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if name := filepath.Base(path); path != dir && strings.HasPrefix(name, ".") {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// visible are the names in a directory that are not temporary; none if there is
// no directory.
func visible(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	return out
}

// manifestOnlyWhole: a manifest that can be seen has all its parts, each right.
func manifestOnlyWhole(t testing.TB, w *world, dir string) {
	t.Helper()
	if _, err := os.Stat(dir + "/b.manifest.xml"); os.IsNotExist(err) {
		return
	}
	w.Want(t, instar.OK, "verify", "-m", dir+"/b.manifest.xml", "-c", w.Keys.UserCert)
}

// partsWhole: a part that has its name is right.
func partsWhole(t testing.TB, w *world, dir string) {
	t.Helper()
	for _, name := range visible(t, dir) {
		same(t, filepath.Join(w.bundle, name), filepath.Join(dir, name))
	}
}

func bundleOpens(t testing.TB, w *world, dir, image string) {
	t.Helper()
	back := t.TempDir()
	w.Want(t, instar.OK, "unbundle", "-m", dir+"/b.manifest.xml", "-s", dir, "-k", w.Keys.UserKey, "-d", back)
	if image != "" {
		same(t, image, back+"/b")
	} else {
		loopfs.Run(t, "e2fsck", "-fn", back+"/b")
	}
}

func absentOrSame(t testing.TB, want, got string) {
	t.Helper()
	if _, err := os.Stat(got); !os.IsNotExist(err) {
		same(t, want, got)
	}
}

func same(t testing.TB, want, got string) {
	t.Helper()
	a, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(got)
	if err != nil {
		t.Error(err)
		return
	}
	if !bytes.Equal(a, b) {
		t.Errorf("%s is not what %s is", got, want)
	}
}

func read(t testing.TB, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
