package boot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/sysfault"
)

// stageEnv makes the test binary run one stage: "STAGE ROOT ENDPOINT".
const stageEnv = "INSTAR_BOOT_TEST_STAGE"

// child runs the stage that the environment names, and ends the process.
func child() {
	f := strings.Fields(os.Getenv(stageEnv))
	if len(f) != 3 {
		return
	}
	err := Run(context.Background(), Options{Root: f[1], Endpoint: f[2], User: "alice", Wait: 1e9, Output: os.Stdout}, Stage(f[0]))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// machine is a host whose root is a filesystem that can lose its power.
type machine struct {
	*host
	image string
}

// cut is a power cut: what was not made durable is gone. The filesystem is
// mounted again as the next start would.
func (m *machine) cut() {
	const (
		shutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN
		noLogFlush = 2
	)
	m.t.Helper()
	dir, err := os.Open(m.o.Root)
	must(m.t, err)
	err = unix.IoctlSetPointerInt(int(dir.Fd()), shutdown, noLogFlush)
	dir.Close()
	must(m.t, err)
	loopfs.Unmount(m.t, m.o.Root)
	m.o.Root = loopfs.Mount(m.t, m.image)
}

// crashes runs a stage in a process of its own once for each of its operations
// on files and kills it there, with and without the power going too, and hands
// each outcome to check. prepare makes the state before.
func crashes(t *testing.T, stage Stage, prepare, check func(m *machine, done bool)) {
	self, err := os.Executable()
	must(t, err)
	// One filesystem for all points: each has a root of its own on it.
	points := 0
	for _, power := range []bool{false, true} {
		for at := 1; ; at++ {
			m := &machine{host: newHost(t)}
			if power {
				m.image = filepath.Join(t.TempDir(), "disk")
				must(t, os.WriteFile(m.image, nil, 0o600))
				must(t, os.Truncate(m.image, 8<<20))
				loopfs.Run(t, "mkfs.ext4", "-q", "-F", m.image)
				m.o.Root = loopfs.Mount(t, m.image)
				furnish(t, m.o.Root)
			}
			prepare(m, false)
			if power {
				unix.Sync()
			}
			env := []string{fmt.Sprintf("%s=%s %s %s", stageEnv, stage, m.o.Root, m.o.Endpoint)}
			r := sysfault.Run(t, sysfault.Fault{Dir: m.o.Root, At: at}, env, self)
			if power {
				m.cut()
			}
			check(m, !r.Hit && r.Code == 0)
			if power {
				loopfs.Unmount(t, m.o.Root)
			}
			if t.Failed() {
				t.Fatalf("killed at operation %d, %+v, power cut %v: %s%s", at, r.Failed, power, r.Stdout, r.Stderr)
			}
			if !r.Hit {
				if r.Code != 0 {
					t.Fatalf("without a fault: %d %s", r.Code, r.Stderr)
				}
				break
			}
			points++
		}
	}
	t.Logf("%s: %d points", stage, points)
	if points < 20 {
		t.Errorf("only %d points: the operations are not seen", points)
	}
}

// TestUserDataCrashes: at most once whatever happens, and visibly so.
func TestUserDataCrashes(t *testing.T) {
	starts := filepath.Join(t.TempDir(), "starts")
	count := func() int {
		data, err := os.ReadFile(starts)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return len(data)
	}
	crashes(t, UserData, func(m *machine, _ bool) {
		os.Remove(starts)
		m.cloud.set("user-data", "#!/bin/sh\nprintf x >>"+starts+"\n")
		must(t, m.stage(Network))
	}, func(m *machine, done bool) {
		before := count()
		s, err := ReadStatus(m.o)
		must(t, err)
		if done && s.UserData != "finished" {
			t.Errorf("it was acknowledged, and is %q now", s.UserData)
		}
		switch s.UserData {
		case "finished", "interrupted":
		case "":
			if before != 0 {
				t.Errorf("it started, and the journal knows nothing of it")
			}
		default:
			t.Errorf("after the crash it is %q", s.UserData)
		}
		if s.UserData == "finished" && before != 1 {
			t.Errorf("finished, and started %d times", before)
		}
		// The next boots.
		for range 2 {
			must(t, m.stage(Network))
			must(t, m.stage(UserData))
		}
		after, err := ReadStatus(m.o)
		must(t, err)
		if count() > 1 {
			t.Errorf("it started %d times", count())
		}
		want := s.UserData
		if want == "" {
			want = "finished"
		}
		if after.UserData != want {
			t.Errorf("it was %q after the crash, and is %q after the next boots", s.UserData, after.UserData)
		}
		// Another instance is not held back by it.
		m.cloud.set("meta-data/instance-id", "i-2")
		must(t, os.RemoveAll(m.at("run/instar")))
		had := count()
		must(t, m.stage(Network))
		must(t, m.stage(UserData))
		if count() != had+1 {
			t.Error("another instance's user data did not run")
		}
	})
}

// TestKeysCrashes: the user's own lines are always there, whole, and what
// metadata gave can always be withdrawn.
func TestKeysCrashes(t *testing.T) {
	own := "# mine\n" + testKey(7, "own") + "\n"
	gone, stays, comes := testKey(1, "gone"), testKey(2, "stays"), testKey(3, "comes")
	crashes(t, Keys, func(m *machine, _ bool) {
		must(t, os.Mkdir(m.at("home/alice/.ssh"), 0o700))
		must(t, os.WriteFile(m.at(authorized), []byte(own), 0o600))
		for _, n := range []string{"home/alice/.ssh", authorized} {
			must(t, os.Chown(m.at(n), alice, alice))
		}
		must(t, m.stage(Network))
		m.cloud.keys(gone, stays)
		must(t, m.stage(Keys))
		m.cloud.keys(stays, comes)
	}, func(m *machine, done bool) {
		switch got := m.read(authorized); {
		case got == own+gone+"\n"+stays+"\n" && !done, got == own+stays+"\n"+comes+"\n":
		default:
			t.Errorf("after the crash authorized_keys is\n%s", got)
		}
		must(t, m.stage(Keys))
		if got, want := m.read(authorized), own+stays+"\n"+comes+"\n"; got != want {
			t.Errorf("after the next run authorized_keys is\n%s\nwant\n%s", got, want)
		}
		m.cloud.keys()
		must(t, m.stage(Keys))
		if got := m.read(authorized); got != own {
			t.Errorf("all withdrawn, authorized_keys is\n%s\nwant\n%s", got, own)
		}
		if s, err := ReadStatus(m.o); err != nil || len(s.Keys) > 0 {
			t.Errorf("status %+v, %v", s, err)
		}
	})
}
