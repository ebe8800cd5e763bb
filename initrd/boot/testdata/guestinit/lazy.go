package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// lazy is a system whose root is filled while it runs. What it does, and in
// which order, is in the kernel's parameters guest.*.
func lazy(params []string) {
	for _, p := range params {
		key, value, _ := strings.Cut(p, "=")
		n, _ := strconv.Atoi(value)
		switch key {
		case "guest.write": // so many KiB to /var/lib/NAME
			name, size, _ := strings.Cut(value, ":")
			n, _ = strconv.Atoi(size)
			say("write", write("/var/lib/"+name, n))
		case "guest.sum": // of a file
			sum(value)
		case "guest.kill": // the server, so often
			for range n {
				kill()
			}
		case "guest.memory": // take so many MiB and keep them
			hog(n)
		case "guest.use": // what the server uses
			use()
		case "guest.complete": // wait until nothing of Instar runs
			for began := time.Now(); len(processes()) > 0; time.Sleep(500 * time.Millisecond) {
				if time.Since(began) > 6*time.Minute {
					say("complete", fmt.Errorf("still there: %v", processes()))
					break
				}
			}
			say("processes", processes())
		case "guest.beat": // write and flush something, now and then, for ever
			go func() {
				// A system that never rests has its disk filled late: it does so first.
				for before := written(); written() < before+1<<20; {
					time.Sleep(500 * time.Millisecond)
				}
				for {
					if err := write("/var/lib/beat", 4); err != nil {
						say("beat", err)
						return
					}
					time.Sleep(200 * time.Millisecond)
				}
			}()
		case "guest.log":
			kernelLog()
		case "guest.reboot": // by force
			reboot()
		}
	}
}

func say(what string, v any) { fmt.Printf("GUEST %s: %v\n", what, v) }

// write makes a file whose content is known by its name.
func write(name string, kib int) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	for i := range kib {
		if _, err := f.Write(bytes.Repeat([]byte(fmt.Sprintf("%s %07d ", filepath.Base(name)[:1], i%1000000)), 1024/10)[:1020]); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

func sum(name string) {
	data, err := os.ReadFile(name)
	say("sum "+name, fmt.Sprintf("%x %v", sha256.Sum256(data), err))
}

// processes are those of the root's server, by pid, with their role.
func processes() map[int]string {
	found := make(map[int]string)
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		line, _ := os.ReadFile(d + "/cmdline")
		if rest, ok := strings.CutPrefix(string(line), "@instar-root\x00"); ok {
			pid, _ := strconv.Atoi(filepath.Base(d))
			found[pid] = strings.TrimRight(rest, "\x00")
		}
	}
	return found
}

// kill kills the server, and waits until a file that is not in memory is read
// and one is written.
func kill() {
	for pid, role := range processes() {
		if role != "keep" {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	began := time.Now()
	err := write("/var/lib/killed", 16)
	say("killed", fmt.Sprintf("goes on after %v, %v", time.Since(began).Round(time.Millisecond), err))
}

func use() {
	total := 0
	for pid, role := range processes() {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		score, _ := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
				kib, _ := strconv.Atoi(strings.Fields(rest)[0])
				total += kib
				say("use "+role, fmt.Sprintf("%d KiB at most, oom score %s", kib, strings.TrimSpace(string(score))))
			}
		}
	}
	say("use of all, KiB", total)
}

// written is how many bytes went to the disk (Documentation/block/stat.rst).
func written() int {
	text, _ := os.ReadFile("/sys/block/vda/stat")
	fields := strings.Fields(string(text))
	if len(fields) < 7 {
		return 0
	}
	sectors, _ := strconv.Atoi(fields[6])
	return sectors * 512
}

// hog takes memory and does not give it back.
func hog(mib int) {
	p, err := syscall.Mmap(-1, 0, mib<<20, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	for i := 0; i < len(p); i += 4096 {
		p[i] = 1
	}
	say("memory", err)
}

// kernelLog shows what the server and the kernel said.
func kernelLog() {
	buf := make([]byte, 1<<20)
	n, _ := syscall.Klogctl(3, buf)
	for line := range strings.Lines(string(buf[:n])) {
		if strings.Contains(line, "instar") || strings.Contains(line, "nbd") || strings.Contains(line, "EXT4") || strings.Contains(line, "rror") {
			fmt.Printf("GUEST log: %s", line)
		}
	}
}

// reboot is reboot -f: a sync and the end.
func reboot() {
	say("write", os.WriteFile("/var/lib/late", bytes.Repeat([]byte("late"), 10*1020/4), 0o644)) // and nothing flushes it
	began := time.Now()
	syscall.Sync()
	say("rebooting after", time.Since(began).Round(time.Millisecond))
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
}
