package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/instar-image/instar/test/bench/internal/served"
)

func startMinIO(ctx context.Context, dir string) (*served.Server, error) {
	bin, err := exec.CommandContext(ctx, "test/tools", "path").Output()
	if err != nil {
		return nil, fmt.Errorf("test/tools: %w", err)
	}
	addr, err := served.Free()
	if err != nil {
		return nil, err
	}
	objects := filepath.Join(dir, "minio")
	if err := os.Mkdir(objects, 0o755); err != nil {
		return nil, err
	}
	return served.Start(ctx, addr, filepath.Join(dir, "minio.log"), []string{"MINIO_ROOT_USER=" + minioUser, "MINIO_ROOT_PASSWORD=" + minioKey, "MINIO_CI_CD=1", "MINIO_UPDATE=off", "MINIO_BROWSER=off"},
		filepath.Join(strings.TrimSpace(string(bin)), "minio"), "server", "--address", addr, "--quiet", objects)
}

// serve starts the server of the filled catalog.
func (f *filled) serve(ctx context.Context, program, dir, minio string) (*served.Server, error) {
	addr, err := served.Free()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "accounts.yaml")
	if err := os.WriteFile(file, []byte(accounts), 0o600); err != nil {
		return nil, err
	}
	return served.Start(ctx, addr, filepath.Join(dir, "instar.log"), []string{
		"AWS_ACCESS_KEY_ID=" + minioUser, "AWS_SECRET_ACCESS_KEY=" + minioKey, "AWS_REGION=us-east-1", "AWS_EC2_METADATA_DISABLED=true",
		"INSTAR_ETC=" + filepath.Join(dir, "etc"), "INSTAR_STATE=" + filepath.Join(dir, "state"),
	}, program, "catalog", "serve", "--store", f.objects.String(), "--url", "http://"+minio, "--sign", filepath.Join(dir, "key"),
		"--signers", filepath.Join(dir, "signers"), "--accounts", file, "--listen", addr, "--access-log", "none")
}

// client makes requests one after the other on a connection.
type client struct {
	addr string
	conn *served.Conn
}

// ask makes a request and returns the body of a 200.
func (c *client) ask(uri string) ([]byte, error) {
	if c.conn == nil {
		conn, err := served.Dial(c.addr, nil)
		if err != nil {
			return nil, err
		}
		c.conn = conn
	}
	return c.conn.Ask("GET "+uri+" HTTP/1.1\r\nHost: catalog\r\n\r\n", nil)
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
