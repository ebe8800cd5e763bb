// A system that lies on what a resident server serves: it writes and reads
// while the server is killed, and while the disk takes the server's place.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/initrd/lazyroot/dm"
	"github.com/instar-image/instar/initrd/lazyroot/resident"
)

func main() {
	var err error
	if resident.Called() {
		err = resident.Main(context.Background(), serve)
	} else {
		err = system()
		if err != nil {
			fmt.Println("GUEST failed:", err)
		}
		fmt.Println("GUEST done")
		unix.Sync()
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
}

// size is what is served: the disk but for its last 64 KiB.
const size = 16<<20 - 64<<10

// serve passes requests on to the disk. The session says when it is filled.
func serve(ctx context.Context, s *resident.Server) error {
	return s.Run(ctx, resident.Export{
		Size: size, BlockSize: 512,
		Say:   func(format string, args ...any) { fmt.Fprintf(os.Stderr, "<3>"+format+"\n", args...) },
		Serve: func(_ context.Context, c net.Conn) error { return answer(c, s.Disk) },
		Fill: func(context.Context) error {
			for b := make([]byte, 1); b[0] == 0; time.Sleep(50 * time.Millisecond) {
				if _, err := s.Session.ReadAt(b, 0); err != nil {
					return err
				}
			}
			return nil
		},
	})
}

// answer is the least there is of an NBD server.
func answer(c net.Conn, disk *os.File) error {
	aligned, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	head := make([]byte, 28)
	for {
		if _, err := io.ReadFull(c, head); err != nil {
			return err
		}
		p := aligned[:binary.BigEndian.Uint32(head[24:])]
		off := int64(binary.BigEndian.Uint64(head[16:]))
		var err error
		reply := append(binary.BigEndian.AppendUint32(nil, 0x67446698), 0, 0, 0, 0)
		reply = append(reply, head[8:16]...)
		switch kind := binary.BigEndian.Uint16(head[6:]); kind {
		case 0:
			_, err = disk.ReadAt(p, off)
			reply = append(reply, p...)
		case 1:
			if _, err = io.ReadFull(c, p); err == nil {
				_, err = disk.WriteAt(p, off)
			}
		case 2:
			return nil
		case 3:
			err = disk.Sync()
		default:
			err = fmt.Errorf("request %d", kind)
		}
		if err != nil {
			return err
		}
		if _, err := c.Write(reply); err != nil {
			return err
		}
	}
}

func system() error {
	for _, m := range []struct{ kind, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	list, err := os.ReadFile("/etc/instar/modules")
	if err != nil {
		return err
	}
	for name := range strings.Lines(string(list)) {
		f, err := os.Open(strings.TrimSpace(name))
		if err != nil {
			return err
		}
		params := ""
		if strings.HasSuffix(f.Name(), "/nbd.ko") {
			params = "nbds_max=1"
		}
		if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil {
			fmt.Println("GUEST", name, err)
		}
		f.Close()
	}
	for range 100 {
		if _, err := os.Stat("/dev/vda"); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	var f resident.Files
	if f.Disk, err = os.OpenFile("/dev/vda", os.O_RDWR|unix.O_DIRECT, 0); err != nil {
		return err
	}
	if f.Control, err = os.OpenFile(dm.ControlPath, os.O_RDWR, 0); err != nil {
		return err
	}
	if f.Config, err = resident.Memory("config", []byte("{}")); err != nil {
		return err
	}
	if f.Session, err = resident.Memory("session", []byte{0}); err != nil {
		return err
	}
	if f.Spared, err = resident.Memory("spared", nil); err != nil {
		return err
	}
	log, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if _, err := resident.Start(context.Background(), f, log); err != nil {
		return err
	}
	f.Disk.Close()
	return use(f)
}

func use(f resident.Files) error {
	nbd, err := os.Open("/dev/nbd0")
	if err != nil {
		return err
	}
	target, err := dm.Number(nbd)
	if err != nil {
		return err
	}
	nbd.Close()
	control := dm.New(f.Control)
	device, err := control.Create(resident.MapName, resident.MapUUID+"test")
	if err != nil {
		return err
	}
	if err := control.Load(resident.MapName, []dm.Linear{{Length: size, Target: target}}); err != nil {
		return err
	}
	if err := control.Resume(resident.MapName); err != nil {
		return err
	}
	fmt.Println("GUEST pids", pids())
	if len(pids()) != 2 {
		return errors.New("not two processes")
	}
	var w writer
	if err := w.start("/dev/" + device.Node()); err != nil {
		return err
	}
	for range 3 {
		time.Sleep(300 * time.Millisecond)
		w.survives("killed", func() {
			for _, pid := range pids() {
				if role(pid) != "keep" {
					unix.Kill(pid, unix.SIGKILL)
				}
			}
		})
	}
	for range 2 {
		w.survives("stopped", func() {
			for _, pid := range pids() {
				unix.Kill(pid, unix.SIGSTOP)
			}
		})
	}
	spared := make([]byte, 100)
	n, err := f.Spared.ReadAt(spared, 0)
	fmt.Println("GUEST spared", strings.Join(strings.Fields(string(spared[:n])), " ") == strings.Trim(fmt.Sprint(pids()), "[]"), err)
	for _, pid := range pids() {
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		oom, _ := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		for line := range strings.Lines(string(status)) {
			if strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "VmLck") {
				fmt.Println("GUEST", role(pid), strings.TrimSpace(line), strings.TrimSpace(string(oom)))
			}
		}
	}
	if err := killInHandOver(control); err != nil {
		return err
	}
	if _, err := f.Session.WriteAt([]byte{1}, 0); err != nil {
		return err
	}
	for began := time.Now(); len(pids()) > 0 && time.Since(began) < 2*time.Minute; {
		time.Sleep(50 * time.Millisecond)
	}
	st, err := f.Spared.Stat()
	fmt.Println("GUEST pids", pids(), "bytes of those spared", st.Size(), err)
	table, err := control.Table(resident.MapName)
	fmt.Println("GUEST table", table, err)
	modules, _ := os.ReadFile("/proc/modules")
	fmt.Println("GUEST nbd is loaded:", bytes.Contains(modules, []byte("nbd ")))
	before := w.count.Load()
	for w.count.Load() < before+50 {
		time.Sleep(10 * time.Millisecond)
	}
	if err := w.stop(); err != nil {
		return err
	}
	return w.check("/dev/vda")
}

// killInHandOver leaves things as a server does that is killed after it has
// suspended the mapped device: the table with the disk is loaded.
func killInHandOver(control *dm.Control) error {
	vda, err := os.Open("/dev/vda")
	if err != nil {
		return err
	}
	disk, err := dm.Number(vda)
	vda.Close()
	if err != nil {
		return err
	}
	for range 100 {
		for _, pid := range pids() {
			if role(pid) != "keep" {
				unix.Kill(pid, unix.SIGKILL)
			}
		}
		// While there is no server, nobody claims the disk.
		for began := time.Now(); time.Since(began) < 30*time.Millisecond; {
			if err = control.Load(resident.MapName, []dm.Linear{{Length: size, Target: disk}}); err == nil {
				fmt.Println("GUEST hand-over begun")
				return control.Suspend(resident.MapName)
			}
		}
	}
	return err
}

// writer writes numbered blocks at random places, reads others, and remembers.
type writer struct {
	f     *os.File
	count atomic.Int64
	end   atomic.Bool
	err   error
	wg    sync.WaitGroup
	wrote map[int64]uint64
}

func (w *writer) start(name string) (err error) {
	if w.f, err = os.OpenFile(name, os.O_RDWR|unix.O_DIRECT, 0); err != nil {
		return err
	}
	w.wrote = make(map[int64]uint64)
	w.wg.Go(func() {
		buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		for n := uint64(1); err == nil && !w.end.Load(); n++ {
			off := rand.Int64N(size/4096) * 4096
			if _, err = w.f.ReadAt(buf, off); err == nil && binary.LittleEndian.Uint64(buf) != w.wrote[off] {
				err = fmt.Errorf("at %d: %d was written, %d is read", off, w.wrote[off], binary.LittleEndian.Uint64(buf))
			}
			if err != nil {
				break
			}
			binary.LittleEndian.PutUint64(buf, n)
			if _, err = w.f.WriteAt(buf, off); err != nil {
				break
			}
			w.wrote[off] = n
			if n%16 == 0 {
				err = w.f.Sync()
			}
			w.count.Add(1)
		}
		if w.err = err; err != nil {
			fmt.Println("GUEST writer:", err)
		}
	})
	return nil
}

// survives does something to the server's processes, and waits until it goes on.
func (w *writer) survives(what string, do func()) {
	before := w.count.Load()
	do()
	began := time.Now()
	for w.count.Load() < before+50 && time.Since(began) < 2*time.Minute {
		time.Sleep(10 * time.Millisecond)
	}
	if w.count.Load() >= before+50 {
		fmt.Printf("GUEST %s: 50 writes later after %v\n", what, time.Since(began).Round(time.Millisecond))
	}
}

func (w *writer) stop() error {
	w.end.Store(true)
	w.wg.Wait()
	return errors.Join(w.err, w.f.Sync(), w.f.Close())
}

func (w *writer) check(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 8)
	for off, n := range w.wrote {
		if _, err := f.ReadAt(b, off); err != nil {
			return err
		}
		if got := binary.LittleEndian.Uint64(b); got != n {
			return fmt.Errorf("%s at %d: %d was written, %d is there", name, off, n, got)
		}
	}
	fmt.Println("GUEST checked", len(w.wrote) > 100)
	return nil
}

// pids are the processes of a resident server.
func pids() (list []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(d))
		if role(pid) != "" {
			list = append(list, pid)
		}
	}
	slices.Sort(list)
	return list
}

func role(pid int) string {
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	rest, ok := strings.CutPrefix(string(line), resident.Name+"\x00")
	if !ok {
		return ""
	}
	return strings.TrimRight(rest, "\x00")
}
