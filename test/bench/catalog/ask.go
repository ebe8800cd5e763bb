package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// child is a server process.
type child struct {
	cmd  *exec.Cmd
	addr string
}

// start runs a server and returns when it takes connections.
func start(ctx context.Context, addr, log string, env []string, program string, args ...string) (*child, error) {
	c := &child{exec.CommandContext(ctx, program, args...), addr}
	c.cmd.Env = append(os.Environ(), env...)
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	f, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c.cmd.Stdout, c.cmd.Stderr = f, f
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	for range 6000 {
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			return c, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.stop()
	said, _ := os.ReadFile(log)
	return nil, fmt.Errorf("%s did not start: %s", program, said)
}

func (c *child) stop() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// rss is the resident memory of the process, now and at most, in MiB.
func (c *child) rss() (now, most float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
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

// free is an address nobody listens on.
func free() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func startMinIO(ctx context.Context, dir string) (*child, error) {
	bin, err := exec.CommandContext(ctx, "test/tools", "path").Output()
	if err != nil {
		return nil, fmt.Errorf("test/tools: %w", err)
	}
	addr, err := free()
	if err != nil {
		return nil, err
	}
	objects := filepath.Join(dir, "minio")
	if err := os.Mkdir(objects, 0o755); err != nil {
		return nil, err
	}
	return start(ctx, addr, filepath.Join(dir, "minio.log"), []string{"MINIO_ROOT_USER=" + minioUser, "MINIO_ROOT_PASSWORD=" + minioKey, "MINIO_CI_CD=1", "MINIO_UPDATE=off", "MINIO_BROWSER=off"},
		filepath.Join(strings.TrimSpace(string(bin)), "minio"), "server", "--address", addr, "--quiet", objects)
}

// serve starts the server of the filled catalog.
func (f *filled) serve(ctx context.Context, program, dir, minio string) (*child, error) {
	addr, err := free()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "accounts.yaml")
	if err := os.WriteFile(file, []byte(accounts), 0o600); err != nil {
		return nil, err
	}
	return start(ctx, addr, filepath.Join(dir, "instar.log"), []string{
		"AWS_ACCESS_KEY_ID=" + minioUser, "AWS_SECRET_ACCESS_KEY=" + minioKey, "AWS_REGION=us-east-1", "AWS_EC2_METADATA_DISABLED=true",
		"INSTAR_ETC=" + filepath.Join(dir, "etc"), "INSTAR_STATE=" + filepath.Join(dir, "state"),
	}, program, "catalog", "serve", "--store", f.objects.String(), "--url", "http://"+minio, "--sign", filepath.Join(dir, "key"),
		"--signers", filepath.Join(dir, "signers"), "--accounts", file, "--listen", addr, "--access-log", "none")
}

// client makes requests one after the other on a connection.
type client struct {
	addr string
	conn net.Conn
	r    *bufio.Reader
}

// ask makes a request and returns the body of a 200.
func (c *client) ask(uri string) ([]byte, error) {
	if c.conn == nil {
		conn, err := net.Dial("tcp", c.addr)
		if err != nil {
			return nil, err
		}
		c.conn, c.r = conn, bufio.NewReaderSize(conn, 64<<10)
	}
	if _, err := fmt.Fprintf(c.conn, "GET %s HTTP/1.1\r\nHost: catalog\r\n\r\n", uri); err != nil {
		return nil, err
	}
	length, status := -1, ""
	for {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return nil, err
		}
		switch {
		case status == "":
			status = string(bytes.TrimSpace(line))
		case bytes.HasPrefix(line, []byte("Content-Length: ")):
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[16:]))); err != nil {
				return nil, err
			}
		case len(line) == 2:
			if length < 0 {
				return nil, errors.New("an answer without a length")
			}
			body := make([]byte, length)
			if _, err := io.ReadFull(c.r, body); err != nil {
				return nil, err
			}
			if status != "HTTP/1.1 200 OK" {
				return nil, fmt.Errorf("%s: %.1000s", status, body)
			}
			return body, nil
		}
	}
}

// times are those of answers, sorted.
type times struct{ all []time.Duration }

func (t *times) at(percent int) time.Duration { return t.all[(len(t.all)-1)*percent/100] }
func (t *times) count() int                   { return len(t.all) }

// connections is how many ask.
const connections = 8

// paced asks at a steady rate and times answers from when each was due to be asked
// for: what waits for another counts.
func paced(ctx context.Context, addr string, rate int, long time.Duration, request func(i int) string) (*times, error) {
	n := int(long.Seconds()) * rate
	requests := make([]string, n)
	for i := range requests {
		requests[i] = request(i)
	}
	t := &times{all: make([]time.Duration, n)}
	errs := make([]error, connections)
	var wg sync.WaitGroup
	begun := time.Now().Add(100 * time.Millisecond)
	for w := range connections {
		wg.Go(func() {
			c := &client{addr: addr}
			for i := w; i < n && ctx.Err() == nil; i += connections {
				due := begun.Add(time.Duration(i) * time.Second / time.Duration(rate))
				time.Sleep(time.Until(due))
				if _, err := c.ask(requests[i]); err != nil {
					errs[w] = err
					return
				}
				t.all[i] = time.Since(due)
			}
			if c.conn != nil {
				c.conn.Close()
			}
		})
	}
	wg.Wait()
	slices.Sort(t.all)
	return t, errors.Join(append(errs, ctx.Err())...)
}
