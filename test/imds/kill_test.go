package imds

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/freeport"
)

// TestKill kills the server, -9, while it is read from, its records change and
// an operator sets events: no answer is mixed, and what the operator was told
// is set is set after the next start. 20 kills; 200 if $INSTAR_EVIDENCE is set.
func TestKill(t *testing.T) {
	kills := evidence.Cases(20, 200)
	addr := freeport.Address(freeport.Port(t))
	record := func(n int) string {
		c := string(rune('a' + n%26))
		return fmt.Sprintf("instance-id: i-1\ncaller: {addresses: [127.0.0.1]}\nami-id: ami-%s\ninstance-type: %s\nuser-data: %s\n",
			strings.Repeat(c, 8), strings.Repeat(c, 50), strings.Repeat(c, 16000))
	}
	s := serve(t, netns{}, map[string]string{"a.yaml": record(0)}, "--listen", addr, "--rate", "0")
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var answers atomic.Int64
	var versions sync.Map
	// get returns a whole answer, or none: a kill cuts some off.
	get := func(path string) (string, bool) {
		res, err := client.Get("http://" + addr + path)
		if err != nil {
			return "", false
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", path, res.Status)
		}
		return string(b), err == nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				data, ok := get("/latest/user-data")
				if ok && (len(data) != 16000 || strings.Trim(data, data[:1]) != "") {
					t.Errorf("a mixed answer of %d bytes", len(data))
				}
				doc, whole := get("/latest/dynamic/instance-identity/document")
				_, after, _ := strings.Cut(doc, `"imageId" : "ami-`)
				if whole && (len(after) < 8 || !strings.Contains(doc, `"instanceType" : "`+strings.Repeat(after[:1], 50)+`"`)) {
					t.Errorf("a mixed document: %s", doc)
				}
				if ok && whole {
					answers.Add(1)
					versions.Store(data[:1], true)
				} else {
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
	}
	wg.Go(func() {
		for n := 1; ctx.Err() == nil; n++ {
			s.write(t, "a.yaml", record(n))
			time.Sleep(20 * time.Millisecond)
		}
	})
	states := []string{"InService", "Standby", "Terminated", "Detached"}
	acknowledged := 0
	for kill := range kills {
		set, acked := make(chan string), make(chan struct{}, 1)
		go func() { // sets events until the server is gone; then tells the last that was acknowledged, and the one that was not
			last, tried := "", ""
			for i := kill; ; i++ {
				tried = states[i%len(states)]
				if exec.Command(instar, "metadata", "ctl", "--control", s.control, "event", "i-1", "lifecycle", tried).Run() != nil {
					break
				}
				last = tried
				select {
				case acked <- struct{}{}:
				default:
				}
			}
			set <- last
			set <- tried
		}()
		// Most are killed after something was acknowledged and read, however busy the machine is.
		for before := answers.Load(); kill%4 != 0 && answers.Load() < before+20 && ctx.Err() == nil; {
			time.Sleep(10 * time.Millisecond)
		}
		if kill%4 != 0 {
			<-acked
		}
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		if err := s.cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s.cmd.Wait()
		last, tried := <-set, <-set
		s.start(t, "--listen", addr, "--rate", "0")
		if last == "" {
			continue
		}
		acknowledged++
		if got, _ := get("/latest/meta-data/autoscaling/target-lifecycle-state"); got != last && got != tried {
			t.Errorf("kill %d: the state is %q; %q was acknowledged, %q tried", kill, got, last, tried)
		}
	}
	stop()
	wg.Wait()
	n, v := int(answers.Load()), 0
	versions.Range(func(any, any) bool { v++; return true })
	t.Logf("%d kills, %d with an acknowledged change before; %d answers of %d versions", kills, acknowledged, n, v)
	if acknowledged < kills/4 || n < 10*kills || v < 3 {
		t.Error("too little happened between the kills for this to prove anything")
	}
}
