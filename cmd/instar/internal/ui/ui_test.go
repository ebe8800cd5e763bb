package ui_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
)

func TestJSONProgressTellsRateAndRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out, errs bytes.Buffer
		p := ui.New(ui.Options{Stdout: &out, Stderr: &errs, Tool: "instar", JSON: true})
		g := p.Progress("bundling", 1000)
		for range 5 {
			g.Add(100)
			time.Sleep(1001 * time.Millisecond)
		}
		g.End()
		var last map[string]any
		n := 0
		for s := bufio.NewScanner(&errs); s.Scan(); n++ {
			if err := json.Unmarshal(s.Bytes(), &last); err != nil || last["message_type"] != "progress" {
				t.Fatalf("%s: %v", s.Text(), err)
			}
		}
		if n != 5 || last["bytes_done"] != 500.0 || last["bytes_total"] != 1000.0 || last["phase"] != "bundling" {
			t.Errorf("after %d objects: %v", n, last)
		}
		if rate, _ := last["bytes_per_second"].(float64); rate < 80 || rate > 120 {
			t.Errorf("the rate is %v, want about 100", rate)
		}
		if left, _ := last["seconds_left"].(float64); left < 4 || left > 6 {
			t.Errorf("%v seconds are left, want about 5", left)
		}
	})
}

func TestNothingMovesWithoutATerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out, errs bytes.Buffer
		p := ui.New(ui.Options{Stdout: &out, Stderr: &errs, Tool: "instar"})
		g := p.Progress("bundling", 1000)
		g.Add(500)
		time.Sleep(5 * time.Second)
		g.End()
		if out.Len()+errs.Len() != 0 || g.Done() != 500 {
			t.Errorf("%q, %q, %d counted", &out, &errs, g.Done())
		}
		var none *ui.Progress
		none.Add(1)
		none.End()
	})
}

// terminal opens a pseudo terminal.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// TestTerminal: on a terminal the line has rate and rest, and is wiped before
// other text; without NO_COLOR a warning is coloured.
func TestTerminal(t *testing.T) {
	for _, noColor := range []bool{false, true} {
		master, slave := terminal(t)
		p := ui.New(ui.Options{Stdout: io.Discard, Stderr: slave, Tool: "instar", NoColor: noColor})
		g := p.Progress("bundling", 1<<20)
		g.Add(1 << 19)
		var seen []byte
		buf := make([]byte, 4096)
		for !bytes.Contains(seen, []byte("50%  512 KiB of 1 MiB")) || !bytes.Contains(seen, []byte("/s")) {
			n, err := master.Read(buf)
			if err != nil {
				t.Fatalf("%v after %q", err, seen)
			}
			seen = append(seen, buf[:n]...)
		}
		p.Warn("careful", nil)
		g.End()
		for !bytes.Contains(seen, []byte("careful")) {
			n, err := master.Read(buf)
			if err != nil {
				t.Fatalf("%v after %q", err, seen)
			}
			seen = append(seen, buf[:n]...)
		}
		if !bytes.Contains(seen, []byte("\r\x1b[Kinstar: ")) {
			t.Errorf("the progress line is not wiped before text: %q", seen)
		}
		if coloured := bytes.Contains(seen, []byte("\x1b[33m")); coloured == noColor {
			t.Errorf("colour %t with NO_COLOR %t", coloured, noColor)
		}
	}
}

func TestSpeaking(t *testing.T) {
	var out, errs bytes.Buffer
	p := ui.New(ui.Options{Stdout: &out, Stderr: &errs, Tool: "ec2-x", Quiet: true})
	p.Say("not told")
	p.Warn("careful", nil)
	p.Error(errors.New("it broke"), 3, "Mend it.")
	if err := p.Result("x", "the result", nil); err != nil {
		t.Fatal(err)
	}
	if want := "ec2-x: warning: careful\nec2-x: error: it broke\nMend it.\n"; errs.String() != want {
		t.Errorf("stderr %q, want %q", &errs, want)
	}
	if out.String() != "the result\n" || p.Warnings() != 1 {
		t.Errorf("stdout %q, %d warnings", &out, p.Warnings())
	}
	errs.Reset()
	p = ui.New(ui.Options{Stdout: &out, Stderr: &errs, Tool: "ec2-x", Debug: true})
	p.Debug("detail", ui.Fields{"k": "v"})
	var o map[string]any
	if err := json.Unmarshal(errs.Bytes(), &o); err != nil || o["k"] != "v" || o["level"] != "debug" {
		t.Errorf("debug output %q: %v", &errs, err)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 30: "10 GiB", 1<<20 - 1: "1 MiB"} {
		if got := ui.Size(n); got != want {
			t.Errorf("Size(%d) = %q, want %q", n, got, want)
		}
	}
	if strings.Contains(ui.Size(1<<62), "?") {
		t.Error("the largest size has no unit")
	}
}
