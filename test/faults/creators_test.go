package faults

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/compare"
	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/upload/images"
)

// TestCreatorsAtOnce lets eight machines capture into one store, some of them
// the same image, while one after the other is killed: nobody waits for the
// dead, and in the end every image is whole.
func TestCreatorsAtOnce(t *testing.T) {
	r := newRemote(t)
	rounds := evidence.Cases(3, 30)
	const creators, names = 8, 5
	var mu sync.Mutex // covers running
	running := map[int]*exec.Cmd{}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var killer sync.WaitGroup
	killed := 0
	killer.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			mu.Lock()
			if cmd := running[n%creators]; cmd != nil {
				_ = cmd.Process.Signal(unix.SIGKILL) // or it has just ended
				killed++
			}
			mu.Unlock()
		}
	})
	var wg sync.WaitGroup
	for n := range creators {
		wg.Go(func() {
			name := fmt.Sprintf("web-%d", n%names)
			for round := range rounds {
				args := createImage(r.trees[round%2], r.bucket+"/many")
				for i := range args {
					if args[i] == "web" {
						args[i] = name
					}
				}
				cmd := r.Command(t.Context(), args...)
				var errs strings.Builder
				cmd.Stderr = &errs
				mu.Lock()
				err := cmd.Start()
				running[n] = cmd
				mu.Unlock()
				if err != nil {
					t.Error(err)
					return
				}
				err = cmd.Wait()
				mu.Lock()
				delete(running, n)
				mu.Unlock()
				if err != nil && cmd.ProcessState.ExitCode() >= 0 {
					t.Errorf("a creator that was not killed: %v\n%s", err, &errs)
				}
			}
		})
	}
	wg.Wait()
	cancel()
	killer.Wait()
	t.Logf("%d captures, %d killed", creators*rounds, killed)
	for n := range names {
		name, img := fmt.Sprintf("web-%d", n), filepath.Join(t.TempDir(), "disk.img")
		if res := r.Run(t, "restore", name, "--store", r.bucket+"/many", "--to", img); res.Code != instar.OK {
			if !strings.Contains(res.Stderr, images.ErrNoImage.Error()) {
				t.Errorf("%s: %s", name, res)
			}
			continue // all its creators were killed
		}
		loopfs.Run(t, "e2fsck", "-fn", img)
		mnt := loopfs.Mount(t, img, "ro")
		var diffs [2][]string
		for v, tree := range r.trees {
			var err error
			diffs[v], err = compare.Trees(tree, mnt, compare.Options{Skip: func(p string) bool {
				return slices.Contains([]string{"lost+found", "dev", "proc", "sys", "run", "mnt", "tmp"}, p)
			}})
			if err != nil {
				t.Fatal(err)
			}
			// The trees share their files: each has another link in the other one.
			diffs[v] = slices.DeleteFunc(diffs[v], func(d string) bool { return strings.HasSuffix(d, ": [1 links], want [2 links]") })
		}
		loopfs.Unmount(t, mnt)
		if len(diffs[0]) > 0 && len(diffs[1]) > 0 {
			t.Errorf("%s is no version of its tree: %q, %q", name, diffs[0], diffs[1])
		}
	}
	// The dead are in nobody's way.
	r.Want(t, instar.OK, createImage(r.trees[0], r.bucket+"/many")...)
}
