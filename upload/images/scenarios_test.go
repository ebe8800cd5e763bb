package images_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// TestInterruptedCollectionLeavesNoStaleChunks is what bit borg: a collection
// that is interrupted after it has deleted packs, and a machine that remembers
// the chunks in them. Whatever the point, the next capture of the same data is
// whole.
func TestInterruptedCollectionLeavesNoStaleChunks(t *testing.T) {
	p := newPeople(t)
	blocks := words("a b c d e f g h i")
	points := 0
	for mode := range 2 {
		for n := 0; ; n++ {
			m := newMem()
			state := t.TempDir()
			s := p.open(t, &actor{mem: m}, state)
			if _, err := p.capture(t.Context(), s, "web", blocks); err != nil {
				t.Fatal(err)
			}
			// This reads the footers, and remembers them.
			if _, err := p.capture(t.Context(), s, "web", blocks); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Delete(t.Context(), "web", p.signer); err != nil {
				t.Fatal(err)
			}
			if _, err := s.GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
				t.Fatal(err)
			}
			k := &killer{n: n, stored: mode == 1}
			collector := p.open(t, k.attach(&actor{mem: m}), "")
			_, _ = collector.GC(t.Context(), images.GCOptions{Grace: -1})
			s = p.open(t, &actor{mem: m}, state)
			if _, err := p.captureUntil(t.Context(), s, "web", blocks); err != nil {
				t.Fatalf("mode %d, operation %d: %v", mode, n, err)
			}
			mustRead(t, s, "web", blocks)
			if !k.fired {
				break
			}
			points++
		}
	}
	t.Logf("%d points", points)
}

// TestDiskFull is what bit restic: the store's disk fills up at any moment, in a
// capture, a collection, a deletion. It is reported as such, nothing that was
// acknowledged suffers, and when there is room again all goes on.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	p := newPeople(t)
	filler := filepath.Join(dir, "filler")
	full, done := 0, 0
	for pages := range 32 {
		root := filepath.Join(dir, fmt.Sprint("store-", pages))
		objects, err := upload.OpenDir(root, true)
		if err != nil {
			t.Fatal(err)
		}
		s := p.open(t, objects, "")
		blocks := words("a b c d e f g h i")
		if _, err := p.capture(t.Context(), s, "web", blocks); err != nil {
			t.Fatal(err)
		}
		if _, err := p.capture(t.Context(), s, "old", words("o l d")); err != nil {
			t.Fatal(err)
		}
		fill(t, dir, filler, int64(pages)*4096)
		whole := func(what string) {
			t.Helper()
			mustRead(t, s, "web", blocks)
			if r, err := s.Verify(t.Context(), images.VerifyOptions{ReadData: true}); err != nil || !r.Sound() {
				t.Fatalf("%d pages left, %s: %+v, %v", pages, what, r, err)
			}
		}
		note := func(what string, err error) {
			t.Helper()
			if err == nil {
				done++
			} else if full++; !errors.Is(err, upload.ErrNoSpace) {
				t.Fatalf("%d pages left, %s: %v", pages, what, err)
			}
			whole(what)
		}
		_, err = p.capture(t.Context(), s, "new", words("n e w 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"))
		note("capture", err)
		_, err = s.Delete(t.Context(), "old", p.signer)
		note("deletion", err)
		for range 2 {
			_, err = s.GC(t.Context(), images.GCOptions{Grace: -1})
			note("collection", err)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if _, err := p.captureUntil(t.Context(), s, "new", words("n e w")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Delete(t.Context(), "old", p.signer); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := s.GC(t.Context(), images.GCOptions{Grace: -1}); err != nil {
				t.Fatal(err)
			}
		}
		whole("with room again")
		mustRead(t, s, "new", words("n e w"))
		objects.Close()
		if err := os.RemoveAll(root); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d operations ended for want of room, %d had enough", full, done)
	if full < 10 || done < 10 {
		t.Error("that proves little")
	}
}

// fill takes all of a filesystem's room but left bytes.
func fill(t testing.TB, dir, name string, left int64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, max(1, int64(st.Bavail)*st.Bsize-left)); err != nil {
		t.Fatal(err)
	}
}

// creatorEnv tells the test binary, started again, to capture as a machine of
// its own.
const creatorEnv = "INSTAR_TEST_CREATOR"

type creatorJob struct {
	Store, Keys, Image, Acks string
	Seed                     uint64
}

func TestMain(m *testing.M) {
	if job := os.Getenv(creatorEnv); job != "" {
		if err := create(job); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// create captures again and again until it is killed, and writes down what was
// acknowledged.
func create(text string) error {
	var job creatorJob
	if err := json.Unmarshal([]byte(text), &job); err != nil {
		return err
	}
	p, err := loadPeople(job.Keys)
	if err != nil {
		return err
	}
	copy(p.owner[:], job.Image)
	objects, err := upload.OpenDir(job.Store, false)
	if err != nil {
		return err
	}
	s, err := images.Open(objects, p.options(filepath.Join(job.Keys, job.Image)))
	if err != nil {
		return err
	}
	acks, err := os.OpenFile(job.Acks, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(job.Seed, 8))
	for {
		var blocks []string
		for range 6 {
			blocks = append(blocks, fmt.Sprint("w", rng.IntN(60)))
		}
		v, err := p.captureUntil(context.Background(), s, job.Image, blocks)
		if errors.Is(err, images.ErrCollected) {
			continue // a busy machine may be slower than the collector's grace again and again
		}
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(acks, "%s@%s %s\n", job.Image, v.Name, strings.Join(blocks, ",")); err != nil {
			return err
		}
	}
}

// savePeople and loadPeople hand keys to other processes.
func savePeople(t testing.TB, dir string) *people {
	t.Helper()
	for _, n := range []string{"signing", "identity"} {
		if _, err := keys.WriteSigningKey(filepath.Join(dir, n), "test"); err != nil {
			t.Fatal(err)
		}
	}
	p, err := loadPeople(dir)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func loadPeople(dir string) (*people, error) {
	signer, err := keys.ReadSigner(filepath.Join(dir, "signing"), nil)
	if err != nil {
		return nil, err
	}
	ids, err := keys.ReadIdentities(filepath.Join(dir, "identity"), nil)
	if err != nil {
		return nil, err
	}
	trust := keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: signer.Public()})
	return &people{signer: signer, trust: trust, id: ids[0]}, nil
}

// TestCreatorsKilled: eight machines capture into one store, two of them under
// one name, one is killed every second, and garbage is collected all the time
// with next to no grace.
func TestCreatorsKilled(t *testing.T) {
	dir := t.TempDir()
	store := filepath.Join(dir, "store")
	p := savePeople(t, dir)
	objects, err := upload.OpenDir(store, true)
	if err != nil {
		t.Fatal(err)
	}
	defer objects.Close()
	s := p.open(t, objects, "")
	kills := 6
	if evidence() {
		kills = 60
	}
	seed := uint64(0)
	start := func(i int) *exec.Cmd {
		seed++
		image := fmt.Sprint("m", max(1, i))
		job, err := json.Marshal(creatorJob{Store: store, Keys: dir, Image: image, Acks: filepath.Join(dir, fmt.Sprint("acks-", seed)), Seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), creatorEnv+"="+string(job))
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	all := make([]*exec.Cmd, 8)
	for i := range all {
		all[i] = start(i)
	}
	stop := func(c *exec.Cmd) {
		_ = c.Process.Kill()
		err := c.Wait()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Exited() {
			t.Errorf("a creator ended by itself: %v", err)
		}
	}
	collections := 0
	for n := range kills {
		for begin := time.Now(); time.Since(begin) < time.Second; collections++ {
			if _, err := s.GC(t.Context(), images.GCOptions{Grace: time.Second}); err != nil {
				t.Error(err)
				break
			}
		}
		i := n % len(all)
		stop(all[i])
		all[i] = start(i)
	}
	acks := func() (lines int) {
		for n := range seed {
			b, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("acks-", n+1)))
			if err == nil { // else it has nothing to say yet
				lines += bytes.Count(b, []byte("\n"))
			}
		}
		return lines
	}
	for limit := time.Now().Add(5 * time.Minute); acks() < 4 && time.Now().Before(limit); {
		time.Sleep(50 * time.Millisecond)
	}
	for _, c := range all {
		stop(c)
	}
	acked := 0
	for n := range seed {
		b, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("acks-", n+1)))
		if err != nil {
			continue // it was killed before it had anything to say
		}
		for line := range strings.Lines(string(b)) {
			ref, blocks, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			if ok && strings.HasSuffix(line, "\n") {
				mustRead(t, s, ref, strings.Split(blocks, ","))
				acked++
			}
		}
	}
	if r, err := s.Scrub(t.Context(), nil); err != nil || len(r.Damages) > 0 {
		t.Errorf("scrub: %+v, %v", r, err)
	}
	if r, err := s.Verify(t.Context(), images.VerifyOptions{ReadData: true}); err != nil || !r.Sound() {
		t.Errorf("verify: %+v, %v", r, err)
	}
	t.Logf("%d versions acknowledged, %d kills, %d collections", acked, kills, collections)
	if acked < 4 {
		t.Error("that proves little")
	}
}
