package catalog

import (
	"bufio"
	"context"
	"encoding/json"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/livelog"
)

// process is a catalog's server that runs.
type process struct {
	url    string
	cmd    *exec.Cmd
	log    livelog.Log // what it says
	killed bool
}

// serveCatalog runs "catalog serve" with arguments and returns when it serves. It
// is told to end when the test ends, and must then end in an orderly way unless it
// was killed.
func serveCatalog(t *testing.T, i *instar.Instar, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{cmd: i.Command(ctx, args...)}
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = time.Minute
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := make(chan string, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(address)
		for lines := bufio.NewReader(stderr); ; {
			line, err := lines.ReadString('\n')
			p.log.Write([]byte(line))
			var l struct{ Message, Address string }
			if json.Unmarshal([]byte(line), &l) == nil && l.Message == "serving the catalog" {
				address <- l.Address
			}
			if err != nil {
				return
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		err := p.cmd.Wait()
		if code := p.cmd.ProcessState.ExitCode(); !p.killed && code != instar.OK && code != instar.Interrupt {
			t.Errorf("the server ended: %v\n%s", err, &p.log)
		}
		if t.Failed() {
			t.Logf("the server's log:\n%s", &p.log)
		}
	})
	select {
	case a, ok := <-address:
		if !ok {
			t.Fatalf("the server did not begin:\n%s", &p.log)
		}
		p.url = "http://" + a
	case <-time.After(3 * time.Minute):
		t.Fatal("the server does not begin")
	}
	return p
}

// kill kills the server at once.
func (p *process) kill(t *testing.T) {
	t.Helper()
	p.killed = true
	if err := p.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
}
