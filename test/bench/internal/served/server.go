// Package served runs the servers that benches measure, and asks them with as
// little work as will do.
//
// What goes in: a program and its arguments; requests as they are on the wire.
// What comes out: the server's address and memory, and its answers' bodies. It
// touches the processes it starts, their logs and their ports.
package served

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Server is a server's process.
type Server struct {
	Address string // HOST:PORT
	cmd     *exec.Cmd
}

// Start runs a program that listens at address, with env in addition to this
// process's own, and returns when it takes connections. What it says goes to the
// file log.
func Start(ctx context.Context, address, log string, env []string, program string, args ...string) (*Server, error) {
	s := &Server{address, exec.CommandContext(ctx, program, args...)}
	s.cmd.Env = append(os.Environ(), env...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s.cmd.Stdout, s.cmd.Stderr = f, f
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	for range 6000 {
		if conn, err := net.Dial("tcp", address); err == nil {
			conn.Close()
			return s, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.Stop()
	said, err := os.ReadFile(log)
	return nil, errors.Join(fmt.Errorf("%s did not start: %s", program, said), err)
}

// Stop kills the server.
func (s *Server) Stop() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// Memory is the resident memory of the server's process, now and at most, in MiB.
func (s *Server) Memory() (now, most float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for name, to := range map[string]*float64{"VmRSS:": &now, "VmHWM:": &most} {
		_, after, _ := strings.Cut(string(b), name)
		f := strings.Fields(after)
		if len(f) == 0 {
			return 0, 0, fmt.Errorf("no %s of the server", name)
		}
		kib, err := strconv.Atoi(f[0])
		if err != nil {
			return 0, 0, err
		}
		*to = float64(kib) / 1024
	}
	return now, most, nil
}

// Free is an address of loopback that nobody listens at.
func Free() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
