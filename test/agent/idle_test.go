// Package agent runs the installed agent as a machine would, and watches it.
package agent

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/instar"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// switches are how often the threads of a process gave up a CPU by themselves:
// each wake-up is one.
func switches(t *testing.T, pid int) int {
	t.Helper()
	files, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/status")
	must(t, err)
	n := 0
	for _, f := range files {
		n += field(t, f, "voluntary_ctxt_switches")
	}
	return n
}

// field is a number in a status file of /proc.
func field(t *testing.T, file, name string) int {
	t.Helper()
	data, err := os.ReadFile(file)
	must(t, err)
	m := regexp.MustCompile(`(?m)^` + name + `:\s*(\d+)`).FindSubmatch(data)
	if m == nil {
		t.Fatalf("%s has no %s", file, name)
	}
	n, err := strconv.Atoi(string(m[1]))
	must(t, err)
	return n
}

// TestIdle holds what an agent costs that has nothing to do: little memory, and
// no wake-up but to tell systemd's watchdog that it lives.
func TestIdle(t *testing.T) {
	program := os.Getenv("INSTAR_BIN")
	if program == "" {
		program = instar.Build(t, "amd64")
	}
	for _, c := range []struct {
		name     string
		watchdog time.Duration
		most     int // wake-ups in ten seconds
	}{{"without a watchdog", 0, 2}, {"with one of 8 s", 8 * time.Second, 150}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			notify := filepath.Join(dir, "notify")
			conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
			must(t, err)
			defer conn.Close()
			must(t, os.WriteFile(filepath.Join(dir, "agent.yaml"), []byte("max-age: 26h\n"), 0o600))
			cmd := exec.Command(program, "agent", "run", "--socket", dir+"/sock", "--state", dir+"/state", "--settings", dir+"/agent.yaml", "--launcher", "child")
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "NOTIFY_SOCKET=" + notify}
			if c.watchdog > 0 {
				cmd.Env = append(cmd.Env, "WATCHDOG_USEC="+strconv.FormatInt(c.watchdog.Microseconds(), 10))
			}
			cmd.Stderr = os.Stderr
			must(t, cmd.Start())
			defer func() {
				must(t, cmd.Process.Signal(unix.SIGTERM))
				must(t, cmd.Wait())
			}()
			buf := make([]byte, 4096)
			alive := 0
			for ready := false; !ready; {
				must(t, conn.SetReadDeadline(time.Now().Add(time.Minute)))
				n, err := conn.Read(buf)
				must(t, err)
				ready = strings.Contains(string(buf[:n]), "READY=1")
			}
			// What starting began has to come to rest, sooner or later.
			time.Sleep(3 * time.Second)
			woke := 0
			for try := 0; try == 0 || try < 6 && woke > c.most; try++ {
				before := switches(t, cmd.Process.Pid)
				must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
				for {
					n, err := conn.Read(buf)
					if err != nil {
						break
					}
					if strings.Contains(string(buf[:n]), "WATCHDOG=1") {
						alive++
					}
				}
				woke = switches(t, cmd.Process.Pid) - before
			}
			rss := field(t, "/proc/"+strconv.Itoa(cmd.Process.Pid)+"/status", "VmRSS")
			t.Logf("in 10 s: %d wake-ups of its threads, %d signs of life; RSS %d KiB", woke, alive, rss)
			if woke > c.most {
				t.Errorf("an idle agent woke up %d times in 10 s, more than %d", woke, c.most)
			}
			if rss > 40<<10 {
				t.Errorf("an idle agent takes %d KiB, more than 40 MiB", rss)
			}
			if c.watchdog > 0 && alive == 0 {
				t.Error("no sign of life in 10 s")
			}
		})
	}
}
