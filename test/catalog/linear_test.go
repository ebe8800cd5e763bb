package catalog

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/test/evidence"
	"github.com/instar-image/instar/test/servers"
	"github.com/instar-image/instar/upload/catalog"
)

const (
	historyClients = 8
	historyServers = 3
	historyNames   = 10 // few: names collide
	historyChanges = 30 // of one image; its record keeps 32
)

// TestLinearizable: eight clients ask three servers over one catalog, which lies
// in a real store. Servers are killed, at requests to the store and between them,
// and begun again; between them and the store requests fail, answers are lost,
// writes arrive late and connections are refused for a while; clients go away.
// Each history is one that a single catalog, asked one thing after the other, could
// have had, and what was acknowledged is in the records once.
func TestLinearizable(t *testing.T) {
	steps := evidence.CasesIn(t, "INSTAR_CATALOG_SERVER_STEPS", 240, 500)
	first := evidence.CasesIn(t, "INSTAR_CATALOG_SERVER_FIRST", 0, 0) // the number of the first history, to see one again
	for _, on := range []struct {
		name      string
		start     func(testing.TB) *servers.Server
		histories int
	}{
		{"minio", servers.MinIO, evidence.CasesIn(t, "INSTAR_CATALOG_SERVER_HISTORIES", 3, 200)},
		{"versitygw", servers.Versity, evidence.CasesIn(t, "INSTAR_CATALOG_VERSITY_HISTORIES", 1, 20)},
	} {
		t.Run(on.name, func(t *testing.T) {
			g := newGround(t, on.start(t), steps)
			sum := map[string]int{}
			for seed := first; seed < first+on.histories; seed++ {
				h := newHistory(t, g, uint64(seed), steps)
				h.run(t)
				if t.Failed() {
					t.Fatalf("history %d:\n%s", seed, h)
				}
				counts := h.counts()
				for k, n := range counts {
					sum[k] += n
				}
				t.Logf("history %d: %v", seed, counts)
			}
			t.Logf("%d histories: %v", on.histories, sum)
			must := []string{"answered", "refused", "unknown", "deaths", "faults", "late"}
			if on.histories >= 20 { // of these there are few in each
				must = append(must, "unknown and done", "unknown and not done", "partitions", "kills at a request")
			}
			for _, k := range must {
				if sum[k] == 0 && on.histories > 0 {
					t.Errorf("%d %s: the faults are not what is meant", sum[k], k)
				}
			}
			if sum["unknown"] > sum["steps"]*3/4 {
				t.Errorf("%d of %d steps of unknown outcome", sum["unknown"], sum["steps"])
			}
		})
	}
}

// history is what clients did and were told.
type history struct {
	g      *ground
	seed   uint64
	prefix string
	begin  time.Time
	fleet  *fleet

	mu      sync.Mutex
	steps   []*step
	next    int
	want    int
	ids     []string       // of images, newest last
	changes map[string]int // tried, of an image
	final   registry
}

func newHistory(t *testing.T, g *ground, seed uint64, want int) *history {
	return &history{g: g, seed: seed, prefix: fmt.Sprintf("h%d", seed), begin: time.Now(), want: want, changes: map[string]int{}}
}

func (h *history) since() int64 { return int64(time.Since(h.begin)) }

func (h *history) run(t *testing.T) {
	k := h.g.open(t, h.prefix)
	if err := k.Create(t.Context(), region); err != nil {
		t.Fatal(err)
	}
	h.fleet = newFleet(t, h.g, h.prefix, historyServers, h.seed, h.since)
	var wg sync.WaitGroup
	for c := range historyClients {
		wg.Go(func() { h.client(t, c) })
	}
	wg.Wait()
	h.fleet.end(t)
	if t.Failed() {
		return
	}
	h.judge(t, k)
}

// client takes steps until there are enough.
func (h *history) client(t *testing.T, number int) {
	rnd := rand.New(rand.NewPCG(h.seed, uint64(number)))
	transport := &http.Transport{Proxy: nil}
	defer transport.CloseIdleConnections()
	for {
		s := h.choose(rnd, number)
		if s == nil {
			return
		}
		for {
			sent, err := h.take(t, transport, rnd, s)
			if err != nil {
				t.Errorf("%s: %v", s.kind, err)
				return
			}
			if sent {
				break
			}
		}
		h.mu.Lock()
		if s.kind == "register" && s.id != "" {
			h.ids = append(h.ids, s.id)
		}
		if !s.unknown || !s.reads() { // a read that was not answered says nothing
			h.steps = append(h.steps, s)
		}
		h.mu.Unlock()
	}
}

// choose is the next step of a client; nil if there are enough.
func (h *history) choose(rnd *rand.Rand, client int) *step {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.next == h.want {
		return nil
	}
	s := &step{client: client, number: h.next, kind: "list"}
	h.next++
	recent := func() string { return h.ids[len(h.ids)-1-rnd.IntN(min(len(h.ids), 8))] }
	n := rnd.IntN(20)
	switch {
	case n < 3 || len(h.ids) == 0:
		s.kind, s.name, s.word = "register", fmt.Sprintf("name-%d", rnd.IntN(historyNames)), fmt.Sprintf("step %d", s.number)
		return s
	case n < 4:
		return s
	case n < 7:
		s.kind, s.id = []string{"describe", "permissions", "look"}[n-4], recent()
		return s
	}
	s.id = recent()
	if h.changes[s.id]++; h.changes[s.id] > historyChanges {
		s.kind = "describe"
		return s
	}
	switch {
	case n < 10:
		s.kind, s.tag, s.value = "tag", fmt.Sprintf("tag-%d", rnd.IntN(4)), strconv.Itoa(s.number)
	case n < 11:
		s.kind, s.tag = "untag", fmt.Sprintf("tag-%d", rnd.IntN(4))
	case n < 14:
		s.kind, s.account = "share", []string{bob, "333344445555"}[rnd.IntN(2)]
	case n < 16:
		s.kind, s.account = "withdraw", []string{bob, "333344445555"}[rnd.IntN(2)]
	case n < 17:
		s.kind = "disable"
	case n < 19:
		s.kind = "enable"
	default:
		s.kind = "deregister"
	}
	return s
}

// form is the request of a step.
func (s *step) form() url.Values {
	v := url.Values{"Version": {"2016-11-15"}, "ImageId": {s.id}}
	switch s.kind {
	case "register":
		return url.Values{"Version": {"2016-11-15"}, "Action": {"RegisterImage"}, "Name": {s.name}, "Description": {s.word}, "RootDeviceName": {"/dev/sda1"}}
	case "list":
		return url.Values{"Version": {"2016-11-15"}, "Action": {"DescribeImages"}, "Owner.1": {"self"}, "IncludeDisabled": {"true"}}
	case "describe", "look":
		return url.Values{"Version": {"2016-11-15"}, "Action": {"DescribeImages"}, "ImageId.1": {s.id}}
	case "permissions":
		v.Set("Action", "DescribeImageAttribute")
		v.Set("Attribute", "launchPermission")
	case "tag", "untag":
		v = url.Values{"Version": {"2016-11-15"}, "Action": {"DeleteTags"}, "ResourceId.1": {s.id}, "Tag.1.Key": {s.tag}}
		if s.kind == "tag" {
			v.Set("Action", "CreateTags")
			v.Set("Tag.1.Value", s.value)
		}
	case "share":
		v.Set("Action", "ModifyImageAttribute")
		v.Set("LaunchPermission.Add.1.UserId", s.account)
	case "withdraw":
		v.Set("Action", "ModifyImageAttribute")
		v.Set("LaunchPermission.Remove.1.UserId", s.account)
	case "deregister":
		v.Set("Action", "DeregisterImage")
	case "disable":
		v.Set("Action", "DisableImage")
	case "enable":
		v.Set("Action", "EnableImage")
	}
	return v
}

// told is what of answers is looked at.
type told struct {
	ImageID string `xml:"imageId"`
	Images  []struct {
		ID    string `xml:"imageId"`
		Name  string `xml:"name"`
		State string `xml:"imageState"`
		Word  string `xml:"description"`
		Tags  []struct {
			Key   string `xml:"key"`
			Value string `xml:"value"`
		} `xml:"tagSet>item"`
	} `xml:"imagesSet>item"`
	Accounts []string `xml:"launchPermission>item>userId"`
	Code     string   `xml:"Errors>Error>Code"`
}

// take asks one of the servers. It is not sent if nobody was there to take it.
func (h *history) take(t *testing.T, transport *http.Transport, rnd *rand.Rand, s *step) (sent bool, err error) {
	r, address, generation, err := h.fleet.at(t.Context(), rnd)
	if err != nil {
		return false, err
	}
	ctx := t.Context()
	if rnd.IntN(60) == 0 { // a client that goes away
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(1+rnd.IntN(40))*time.Millisecond)
		defer cancel()
	}
	body := s.form().Encode()
	req, err := http.NewRequestWithContext(ctx, "POST", address, strings.NewReader(body))
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	key := keyOf(s.number)
	if s.kind == "look" {
		key = "AKBOB"
	}
	sum := sha256.Sum256([]byte(body))
	if err := v4.NewSigner().SignHTTP(ctx, aws.Credentials{AccessKeyID: key, SecretAccessKey: secretOf(key)}, req, hex.EncodeToString(sum[:]), "ec2", region, time.Now()); err != nil {
		return false, err
	}
	s.server, s.generation, s.mark = r.name, generation, -1
	s.began = h.since()
	status, doc, err := exchange(transport, req)
	s.over = h.since()
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return false, nil
	}
	var a told
	if err == nil {
		err = xml.Unmarshal(doc, &a)
	}
	if err != nil { // the server died, or the client went away: it ends with the server
		s.unknown = true
		return true, nil
	}
	if status >= http.StatusInternalServerError {
		s.unknown = true
		s.mark, err = r.wire.mark(context.WithoutCancel(t.Context()))
		return true, err
	}
	s.code = a.Code
	if s.code == "" {
		s.read(&a)
	}
	return true, nil
}

func exchange(transport *http.Transport, r *http.Request) (status int, doc []byte, err error) {
	res, err := transport.RoundTrip(r)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	doc, err = io.ReadAll(res.Body)
	return res.StatusCode, doc, err
}

// read takes down what a step saw.
func (s *step) read(a *told) {
	seen := registry{}
	for _, i := range a.Images {
		r := &record{name: i.Name, state: i.State, word: i.Word, tags: map[string]string{}}
		for _, t := range i.Tags {
			r.tags[t.Key] = t.Value
		}
		seen[i.ID] = r
	}
	switch s.kind {
	case "register":
		s.id = a.ImageID
	case "list":
		s.saw = seen.listed()
	case "describe", "look":
		if r := seen[s.id]; r != nil && len(seen) == 1 {
			s.saw = r.shown()
			if s.kind == "look" {
				s.saw = r.name
			}
		}
	case "permissions":
		s.saw = strings.Join(slices.Sorted(slices.Values(a.Accounts)), ",")
	}
}

// judge holds the history against the records that are left, and against the model.
func (h *history) judge(t *testing.T, k *catalog.Catalog) {
	done := map[string]string{} // by the access key of a step, the image that it changed
	h.final = registry{}
	err := k.Read(t.Context(), func(v *catalog.View) error {
		clear(done)
		clear(h.final)
		for m, err := range v.Images(t.Context()) {
			if err != nil {
				return err
			}
			if int(m.Revision) != len(m.History) {
				t.Errorf("%s has revision %d and %d lines of history", m.ID, m.Revision, len(m.History))
			}
			for _, c := range m.History {
				if done[c.By] != "" {
					t.Errorf("a step was done twice: %s by %s", c.Action, c.By)
				}
				done[c.By] = m.ID
			}
			r := &record{name: m.Name, state: string(m.State), word: m.Description, tags: m.Tags, accounts: map[string]bool{}}
			for _, a := range m.LaunchAccounts {
				r.accounts[a] = true
			}
			h.final[m.ID] = r
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	last := h.since()
	replicas := map[string]*replica{}
	for _, r := range h.fleet.replicas {
		replicas[r.name] = r
	}
	var ops []porcupine.Operation
	for _, s := range h.steps {
		id, was := done[keyOf(s.number)]
		switch {
		case s.reads():
		case s.unknown && !was:
			continue // nothing can come of it any more
		case s.unknown:
			s.id, s.did = id, true
			if s.mark < 0 {
				s.mark = replicas[s.server].marks[s.generation]
			}
			s.over = max(s.over, replicas[s.server].wire.over(s.mark))
		case s.code == "" && (!was || id != s.id):
			t.Errorf("%s %s of step %d was acknowledged, and is not in the record", s.kind, s.id, s.number)
		case s.code != "" && was:
			t.Errorf("%s %s of step %d was refused with %s, and is in the record", s.kind, s.id, s.number, s.code)
		}
		ops = append(ops, porcupine.Operation{ClientId: len(ops), Input: s, Call: s.began, Return: s.over})
	}
	final := &step{kind: "all", saw: h.final.String(), began: last + 1, over: last + 2}
	ops = append(ops, porcupine.Operation{ClientId: len(ops), Input: final, Call: final.began, Return: final.over})
	switch porcupine.CheckOperationsTimeout(registryModel, ops, 5*time.Minute) {
	case porcupine.Illegal:
		t.Errorf("no order of the %d steps explains what was answered", len(ops))
	case porcupine.Unknown:
		t.Errorf("no order of the %d steps was found, nor that there is none", len(ops))
	}
}

// counts says what happened.
func (h *history) counts() map[string]int {
	n := map[string]int{"steps": len(h.steps), "images": len(h.final)}
	for _, s := range h.steps {
		switch {
		case s.did:
			n["unknown"]++
			n["unknown and done"]++
		case s.unknown:
			n["unknown"]++
			n["unknown and not done"]++
		case s.code != "":
			n["refused"]++
		default:
			n["answered"]++
		}
	}
	for _, r := range h.fleet.replicas {
		n["deaths"] += r.generation
		n["requests"] += len(r.wire.ended)
		for k, v := range r.wire.counts {
			n[k] += v
		}
	}
	return n
}

// String is the history, for a person.
func (h *history) String() string {
	var b strings.Builder
	steps := slices.SortedFunc(slices.Values(h.steps), func(a, b *step) int { return int(a.began - b.began) })
	for _, s := range steps {
		fmt.Fprintf(&b, "%9.3f %9.3f client %d %s gen %d %s\n", float64(s.began)/1e6, float64(s.over)/1e6, s.client, s.server, s.generation, registryModel.DescribeOperation(s, nil))
	}
	for _, id := range slices.Sorted(maps.Keys(h.final)) {
		fmt.Fprintf(&b, "%s %s\n", id, h.final[id].shown())
	}
	return b.String()
}
