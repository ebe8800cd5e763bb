// Command agent measures what a capture at the agent's default limits does to
// others: the latency of a small loop that writes 4 KiB and waits until they
// are on the disk, alone and while the agent captures a tree on that disk, in
// alternating turns of one run. It prints a table with targets.
//
//	go run ./test/bench/agent [-turns N] [-turn DURATION] [-size MIB] [-dir DIR]
//
// The store is in memory, in the place of one across a network. What holds the
// capture back is the share of the time it reads and the classes of CPU and disk; the
// weights that systemd adds do not show here.
package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	turns := flag.Int("turns", 7, "pairs of turns; the median of their ratios counts")
	turn := flag.Duration("turn", 5*time.Second, "length of a turn")
	size := flag.Int("size", 2048, "`MIB` of the tree that is captured")
	dir := flag.String("dir", "/var/tmp", "`DIR` on the disk that is measured")
	flag.Parse()
	met, err := bench(*turns, *turn, *size, *dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	if !met {
		os.Exit(2)
	}
}

// machine is an agent with something to capture, and a file to write to.
type machine struct {
	program, dir, store, socket string
	files                       []string
	foreground                  *os.File
	captures                    int // begun so far
}

func bench(turns int, turn time.Duration, size int, where string) (met bool, err error) {
	dir, err := os.MkdirTemp(where, "instar-bench-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	store, err := os.MkdirTemp("/dev/shm", "instar-bench-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(store)
	m := &machine{program: filepath.Join(dir, "instar"), dir: dir, store: store, socket: filepath.Join(dir, "sock")}
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", m.program, "./cmd/instar").CombinedOutput(); err != nil {
		return false, fmt.Errorf("building instar: %w\n%s", err, out)
	}
	if err := m.fill(size); err != nil {
		return false, err
	}
	if m.foreground, err = os.Create(filepath.Join(dir, "foreground")); err != nil {
		return false, err
	}
	defer m.foreground.Close()
	agent := exec.Command(m.program, "agent", "run", "--socket", m.socket, "--state", filepath.Join(dir, "state"), "--launcher", "child", "--quiet")
	agent.Env = append(os.Environ(), "INSTAR_ETC="+filepath.Join(dir, "etc"), "INSTAR_STATE="+filepath.Join(dir, "seen"))
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer // also that captures were interrupted
	agent.Stderr = &said
	if err := agent.Start(); err != nil {
		return false, err
	}
	defer func() {
		if err = errors.Join(err, agent.Process.Signal(syscall.SIGTERM), agent.Wait()); err != nil {
			err = fmt.Errorf("%w\n%s", err, said.Bytes())
		}
	}()
	for range 100 {
		if _, err = m.ctl("status"); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return false, err
	}
	var median, high []float64
	var base, loaded []time.Duration
	for range turns {
		alone, err := m.write(turn)
		if err != nil {
			return false, err
		}
		beside, err := m.beside(turn)
		if err != nil {
			return false, err
		}
		median = append(median, float64(at(beside, 50))/float64(at(alone, 50)))
		high = append(high, float64(at(beside, 95))/float64(at(alone, 95)))
		base, loaded = append(base, at(alone, 50)), append(loaded, at(beside, 50))
	}
	slices.Sort(median)
	slices.Sort(high)
	slices.Sort(base)
	slices.Sort(loaded)
	growth := 100 * (median[turns/2] - 1)
	met = growth <= 20
	tw := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "agent\tfigure\ttarget\t")
	fmt.Fprintf(tw, "write 4 KiB and sync, alone, median\t%v\t\t\n", base[turns/2].Round(time.Microsecond))
	fmt.Fprintf(tw, "the same beside a capture at default limits\t%v\t\t\n", loaded[turns/2].Round(time.Microsecond))
	fmt.Fprintf(tw, "growth of the median, median of %d pairs\t%+.1f %%\t<= +20 %%\t%s\n", turns, growth, map[bool]string{true: "MET", false: "MISSED"}[met])
	fmt.Fprintf(tw, "growth of the 95th percentile\t%+.1f %%\t\t\n", 100*(high[turns/2]-1))
	return met, tw.Flush()
}

// at is a percentile of sorted times.
func at(sorted []time.Duration, percent int) time.Duration {
	return sorted[(len(sorted)-1)*percent/100]
}

// fill makes the tree that is captured, of what does not compress.
func (m *machine) fill(size int) error {
	if err := os.Mkdir(filepath.Join(m.dir, "tree"), 0o755); err != nil {
		return err
	}
	const each = 16 << 20
	buf := make([]byte, each)
	for i := range max(1, size<<20/each) {
		if _, err := rand.Read(buf); err != nil {
			return err
		}
		name := filepath.Join(m.dir, "tree", fmt.Sprintf("file-%04d", i))
		if err := os.WriteFile(name, buf, 0o644); err != nil {
			return err
		}
		m.files = append(m.files, name)
	}
	unix.Sync()
	return nil
}

// forget drops the tree from the page cache: captures read the disk.
func (m *machine) forget() error {
	for _, name := range m.files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// write is the small loop: a write each 10 ms, sorted times until it is on disk.
func (m *machine) write(turn time.Duration) ([]time.Duration, error) {
	var times []time.Duration
	buf := make([]byte, 4096)
	for until := time.Now().Add(turn); time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		begin := time.Now()
		if _, err := m.foreground.WriteAt(buf, int64(len(times)%256)*4096); err != nil {
			return nil, err
		}
		if err := unix.Fdatasync(int(m.foreground.Fd())); err != nil {
			return nil, err
		}
		times = append(times, time.Since(begin))
	}
	slices.Sort(times)
	return times, nil
}

func (m *machine) ctl(args ...string) (string, error) {
	out, err := exec.Command(m.program, append([]string{"agent", "ctl", "--socket", m.socket}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("instar agent ctl %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

var (
	taskID  = regexp.MustCompile(`bun-[0-9a-f]{17}`)
	reading = regexp.MustCompile(`"phase": "capturing`)
)

// slice is how long is written before it is asked whether the capture goes on.
const slice = 500 * time.Millisecond

// beside is write while captures go on, one after the other until the turn is
// over. The slice in which one ends does not count: it would flatter it.
func (m *machine) beside(turn time.Duration) ([]time.Duration, error) {
	var times []time.Duration
	for measured := time.Duration(0); measured < turn; {
		before := measured
		id, err := m.capture()
		if err != nil {
			return nil, err
		}
		out := ""
		for measured < turn {
			part, err := m.write(slice)
			if err != nil {
				return nil, err
			}
			if out, err = m.ctl("show", id); err != nil {
				return nil, err
			}
			if !strings.Contains(out, `"state": "bundling"`) {
				break
			}
			times = append(times, part...)
			measured += slice
		}
		if strings.Contains(out, `"state": "failed"`) || measured == before {
			return nil, fmt.Errorf("the capture failed, or was over within %v: then give -size more\n%s", slice, out)
		}
		_, _ = m.ctl("cancel", id)   // which it may have forestalled by ending
		_, _ = m.ctl("progress", id) // until it has ended; that it was cancelled is its exit status
	}
	slices.Sort(times)
	return times, nil
}

// capture starts a capture and returns its task when it reads. Each has a store
// of its own, in which nothing is known yet; what the one before stored goes.
func (m *machine) capture() (id string, err error) {
	if err := m.forget(); err != nil {
		return "", err
	}
	if err := os.RemoveAll(filepath.Join(m.store, strconv.Itoa(m.captures))); err != nil {
		return "", err
	}
	m.captures++
	out, err := m.ctl("start", "create-image", "--name", "bench", "--store", filepath.Join(m.store, strconv.Itoa(m.captures)),
		"--volume", filepath.Join(m.dir, "tree"), "--no-kernel", "--full")
	if err != nil {
		return "", err
	}
	id = taskID.FindString(out)
	for tries := 0; !reading.MatchString(out); tries++ {
		if tries == 600 || strings.Contains(out, `"ended"`) {
			return "", fmt.Errorf("the capture does not begin:\n%s", out)
		}
		time.Sleep(100 * time.Millisecond)
		if out, err = m.ctl("show", id); err != nil {
			return "", err
		}
	}
	return id, nil
}
