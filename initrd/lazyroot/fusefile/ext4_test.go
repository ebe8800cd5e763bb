package fusefile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/initrd/lazyroot/internal/lazytest"
	"github.com/instar-image/instar/test/loopfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ext4Image is an ext4 of size bytes with so many files in each of its directories,
// and the files.
func ext4Image(t *testing.T, size int64, files int) (*lazytest.Store, string) {
	t.Helper()
	tree := filepath.Join(t.TempDir(), "tree")
	r := rand.New(rand.NewPCG(1, 2))
	for d := range 6 {
		dir := filepath.Join(tree, fmt.Sprint("dir", d))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for f := range files {
			p := make([]byte, r.IntN(150_000))
			for i := range p {
				p[i] = byte(r.Uint32() >> 24 & uint32(63<<(d%2)))
			}
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file", f)), p, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	image := filepath.Join(t.TempDir(), "image")
	loopfs.Run(t, "mkfs.ext4", "-q", "-F", "-d", tree, image, fmt.Sprint(size>>10)+"k")
	data, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	return lazytest.FromBytes(t, data, 16<<10), tree
}

// mostNames is how many files and how many directories one load has at a time.
const mostNames = 100

// load changes two trees alike, one of them on the device, until rounds are done.
func load(seed uint64, rounds int, a, b string) error {
	r := rand.New(rand.NewPCG(seed, 5))
	var files, dirs []string
	next := 0
	both := func(f func(root string) error) error { return errors.Join(f(a), f(b)) }
	for range rounds {
		pick := func() int { return r.IntN(len(files)) }
		k := r.IntN(10)
		switch {
		case len(files) == 0:
			k = 0
		case len(files) > mostNames:
			k = 4
		}
		var err error
		switch k {
		case 0, 1:
			next++
			name := fmt.Sprintf("f%d-%d", seed, next)
			p := bytes.Repeat([]byte(name+" "), r.IntN(9000))
			files = append(files, name)
			err = both(func(d string) error { return os.WriteFile(filepath.Join(d, name), p, 0o600) })
		case 2, 3:
			name, off, p := files[pick()], r.Int64N(100_000), bytes.Repeat([]byte{byte(r.Uint32())}, 1+r.IntN(20_000))
			err = both(func(d string) error {
				f, err := os.OpenFile(filepath.Join(d, name), os.O_WRONLY, 0)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = f.WriteAt(p, off)
				return err
			})
		case 4:
			i := pick()
			name := files[i]
			files = append(files[:i], files[i+1:]...)
			err = both(func(d string) error { return os.Remove(filepath.Join(d, name)) })
		case 5:
			i := pick()
			next++
			from, to := files[i], fmt.Sprintf("r%d-%d", seed, next)
			files[i] = to
			err = both(func(d string) error { return os.Rename(filepath.Join(d, from), filepath.Join(d, to)) })
		case 6:
			name, n := files[pick()], r.Int64N(60_000)
			err = both(func(d string) error { return os.Truncate(filepath.Join(d, name), n) })
		case 7:
			var f *os.File
			if f, err = os.OpenFile(filepath.Join(a, files[pick()]), os.O_WRONLY, 0); err == nil {
				err = errors.Join(f.Sync(), f.Close())
			}
		case 8:
			next++
			name := fmt.Sprintf("d%d-%d", seed, next)
			err = both(func(d string) error {
				return errors.Join(os.Mkdir(filepath.Join(d, name), 0o700), os.Symlink(name, filepath.Join(d, name, "up")))
			})
			if dirs = append(dirs, name); err == nil && len(dirs) > mostNames {
				err = both(func(d string) error { return os.RemoveAll(filepath.Join(d, dirs[0])) })
				dirs = dirs[1:]
			}
		case 9:
			name := files[pick()]
			var p, q []byte
			p, err = os.ReadFile(filepath.Join(a, name))
			if err == nil {
				q, err = os.ReadFile(filepath.Join(b, name))
			}
			if err == nil && !bytes.Equal(p, q) {
				err = fmt.Errorf("%s: other bytes", name)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// compare compares two trees.
func compare(t *testing.T, a, b string) {
	t.Helper()
	names := func(root string) map[string]string {
		m := map[string]string{}
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(root, path)
			switch {
			case rel == "." || rel == "lost+found":
			case e.Type().IsRegular():
				p, err := os.ReadFile(path)
				m[rel] = string(p)
				return err
			case e.Type()&fs.ModeSymlink != 0:
				to, err := os.Readlink(path)
				m[rel] = "-> " + to
				return err
			default:
				m[rel] = "directory"
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	x, y := names(a), names(b)
	for n, v := range x {
		if w, ok := y[n]; !ok || v != w {
			t.Errorf("%s differs (there: %v, %d bytes and %d)", n, ok, len(v), len(w))
		}
	}
	if len(x) != len(y) || len(x) < 100 {
		t.Errorf("%d names and %d", len(x), len(y))
	}
}

// TestExt4 has the kernel's ext4 on a disk that is being filled, under load and
// with stores that fail; then the plain disk is checked and compared.
func TestExt4(t *testing.T) {
	rounds, size, files := 300, int64(48<<20), 25
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		// So much that it is still coming for most of the time.
		rounds, size, files = 6000, 160<<20, 100
	}
	s, tree := ext4Image(t, size, files)
	flaky := lazytest.NewFlaky(s, 9)
	flaky.Errors.Store(400)
	bad := lazytest.NewFlaky(s, 10)
	bad.Garbles.Store(300)
	alarms := 0
	var mu sync.Mutex
	img, err := lazyroot.NewImage(s.Index, lazyroot.ImageOptions{
		Sources: []lazyroot.NamedSource{{Name: "cache", Source: bad}, {Name: "store", Source: flaky}},
		Pause:   time.Millisecond, Alarm: func(lazyroot.Alarm) { mu.Lock(); alarms++; mu.Unlock() },
	})
	if err != nil {
		t.Fatal(err)
	}
	id := lazyroot.Identity{Manifest: chunked.Name{1}, Size: int64(len(s.Data)), Instance: "i-1", Secret: s.Key[:]}
	path := filepath.Join(t.TempDir(), "local")
	local, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	size = lazyroot.DiskSize(id.Size)
	// A disk that was somebody else's.
	if _, err := local.Write(bytes.Repeat([]byte("somebody else's "), int(size/16))); err != nil {
		t.Fatal(err)
	}
	disk := lazyroot.FileDisk(local, size)
	if err := lazyroot.Format(disk, id); err != nil {
		t.Fatal(err)
	}
	dev, err := lazyroot.Open(t.Context(), lazyroot.Options{Image: img, Disk: disk, Identity: id})
	if err != nil {
		t.Fatal(err)
	}
	file, err := Mount(t.TempDir(), dev, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	mounted := false
	mnt := t.TempDir()
	defer func() {
		if mounted {
			unix.Unmount(mnt, unix.MNT_DETACH)
		}
		file.Abort()
	}()
	loop, err := Attach(file.Path(), Range{}, false)
	if err != nil {
		t.Fatal(err)
	}
	err = unix.Mount(loop.Name(), mnt, "ext4", unix.MS_NOATIME, "discard")
	loop.Close()
	if err != nil {
		t.Fatal(err)
	}
	mounted = true
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	filled := make(chan error, 1)
	go func() { filled <- dev.Hydrate(ctx, nil, lazyroot.Throttle{Rate: 1 << 20, Idle: time.Millisecond}) }()
	var all sync.WaitGroup
	for w := range 4 {
		dir := fmt.Sprint("dir", w)
		all.Go(func() {
			if err := load(uint64(w), rounds, filepath.Join(mnt, dir), filepath.Join(tree, dir)); err != nil {
				t.Errorf("load %d: %v", w, err)
			}
		})
	}
	all.Go(func() {
		fio := exec.Command("fio", "--name=f", "--directory="+mnt, "--size=4m", "--rw=randrw", "--bs=512-16k", "--verify=crc32c", "--fsync=32",
			"--ioengine=psync", "--numjobs=2", "--group_reporting", "--output-format=terse", fmt.Sprint("--io_size=", rounds/75, "m"))
		fio.Dir = t.TempDir() // where it leaves its state
		out, err := fio.CombinedOutput()
		if err != nil {
			t.Errorf("fio: %v\n%s", err, out)
		}
		for _, f := range []string{"f.0.0", "f.1.0"} {
			if err := os.Remove(filepath.Join(mnt, f)); err != nil {
				t.Error(err)
			}
		}
	})
	all.Wait()
	t.Logf("%d rounds of each load; the disk when they ended: %+v", rounds, dev.Stats())
	if err := <-filled; err != nil {
		t.Fatal(err)
	}
	compare(t, tree, mnt)
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	<-file.Idle()
	if err := file.Unmount(); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	if alarms == 0 || flaky.Failed.Load() == 0 {
		t.Errorf("%d alarms, %d failed reads: the stores did not fail", alarms, flaky.Failed.Load())
	}
	mu.Unlock()
	// The plain disk, without its tail.
	if err := os.Truncate(path, id.Size); err != nil {
		t.Fatal(err)
	}
	loopfs.Run(t, "e2fsck", "-fn", path)
	compare(t, tree, loopfs.Mount(t, path, "ro"))
}
