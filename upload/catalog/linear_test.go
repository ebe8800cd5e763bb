package catalog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/instar-image/instar/test/evidence"
)

// linearIn is an operation of a history. Ids are the client's choice, so that
// what an operation of unknown outcome did is known if it did it.
type linearIn struct {
	op, name, id, key, value string
}

type linearOut struct {
	code    string // "" if it was done
	unknown bool
	state   string // of a read
}

// linearState is a catalog as the model has it: by id, "name|tags", "-" once
// deregistered.
type linearState map[string]string

func (s linearState) String() string {
	var l []string
	for _, id := range slices.Sorted(maps.Keys(s)) {
		l = append(l, id+"="+s[id])
	}
	return strings.Join(l, ";")
}

func parseLinear(s string) linearState {
	m := linearState{}
	for e := range strings.SplitSeq(s, ";") {
		if id, v, ok := strings.Cut(e, "="); ok {
			m[id] = v
		}
	}
	return m
}

// step is the sequential catalog: what op does to a state, and the code that it
// answers.
func (s linearState) step(in linearIn) (linearState, string) {
	n := maps.Clone(s)
	live := func(id string) (name string, tags string, ok bool) {
		v, has := s[id]
		if !has || v == "-" {
			return "", "", false
		}
		name, tags, _ = strings.Cut(v, "|")
		return name, tags, true
	}
	switch in.op {
	case "register":
		for id := range s {
			if name, _, ok := live(id); ok && name == in.name {
				return s, CodeAMINameDuplicate
			}
		}
		n[in.id] = in.name + "|"
	case "deregister", "tag":
		name, tags, ok := live(in.id)
		if !ok {
			if s[in.id] == "-" {
				return s, CodeAMIUnavailable
			}
			return s, CodeAMINotFound
		}
		if in.op == "deregister" {
			n[in.id] = "-"
			break
		}
		all := map[string]string{}
		for t := range strings.SplitSeq(tags, ",") {
			if k, v, ok := strings.Cut(t, ":"); ok {
				all[k] = v
			}
		}
		all[in.key] = in.value
		var l []string
		for _, k := range slices.Sorted(maps.Keys(all)) {
			l = append(l, k+":"+all[k])
		}
		n[in.id] = name + "|" + strings.Join(l, ",")
	}
	return n, ""
}

var linearModel = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		in, out := input.(linearIn), output.(linearOut)
		if in.op == "read" {
			return out.unknown || out.state == state.(string), state
		}
		next, code := parseLinear(state.(string)).step(in)
		if out.unknown {
			return true, next.String()
		}
		return out.code == code, next.String()
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(input, output any) string {
		return fmt.Sprintf("%+v → %+v", input, output)
	},
}

// perform carries out an operation on a catalog.
func perform(ctx context.Context, c *Catalog, in linearIn) linearOut {
	call := Call{Account: alice}
	var err error
	out := linearOut{}
	switch in.op {
	case "register":
		err = c.Update(ctx, func(t *Tx) error {
			m := &Image{ID: in.id, Name: in.name, Owner: alice, State: Available, Created: t.Now(), Kind: KindNone, RootDeviceType: "ebs"}
			m.defaults()
			_, err := t.create(ctx, m, call, "RegisterImage", "")
			return err
		})
	case "deregister":
		err = c.Deregister(ctx, call, in.id)
	case "tag":
		err = c.SetTags(ctx, call, []string{in.id}, Tags{in.key: in.value})
	case "read":
		err = c.Read(ctx, func(v *View) error {
			s := linearState{}
			for m, err := range v.Images(ctx) {
				if err != nil {
					return err
				}
				if s[m.ID] = "-"; m.State == Deregistered {
					continue
				}
				var tags []string
				for _, k := range m.Tags.Sorted() {
					tags = append(tags, k+":"+m.Tags[k])
				}
				s[m.ID] = m.Name + "|" + strings.Join(tags, ",")
			}
			out.state = s.String()
			return nil
		})
	}
	var refusal *Error
	switch {
	case err == nil:
	case errors.As(err, &refusal):
		out.code = refusal.Code
	default:
		out.unknown = true
	}
	return out
}

var errKilled = errors.New("killed")

// linearHistory has clients change one catalog at once. Requests fail, replies
// are lost, and clients die at any request: their operation's outcome is
// unknown, and another client takes the place.
func linearHistory(t *testing.T, seed uint64, clients, ops int) []porcupine.Operation {
	mem := newMemory()
	signer := testSigner(t)
	setup := open(t, mem.client(nil), signer, nil)
	if err := setup.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	var clock atomic.Int64
	var mu sync.Mutex
	var history []porcupine.Operation
	var ids []string
	now := func() int64 { return clock.Add(1) } // later calls get later times
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(client)))
			born := func() (*Catalog, *atomic.Bool) {
				dead := &atomic.Bool{}
				var rmu sync.Mutex
				s := mem.client(func(op, key string, done bool) error {
					if dead.Load() {
						return errKilled
					}
					rmu.Lock()
					defer rmu.Unlock()
					switch n := r.IntN(400); {
					case n == 0:
						dead.Store(true)
						return errKilled
					case n < 8:
						return errFault
					}
					return nil
				})
				c, err := Open(s, Options{Trust: trustIn(signer.Public()), Signer: signer})
				if err != nil {
					t.Error(err)
				}
				c.checked = true
				return c, dead
			}
			c, dead := born()
			for i := range ops / clients {
				in := linearIn{op: "read"}
				mu.Lock()
				switch n := r.IntN(10); {
				case n < 3:
					in = linearIn{op: "register", name: fmt.Sprintf("name-%d", r.IntN(4)), id: fmt.Sprintf("ami-%017x", uint64(client)<<32|uint64(i))}
					ids = append(ids, in.id)
				case n < 5 && len(ids) > 0:
					in = linearIn{op: "deregister", id: ids[len(ids)-1-r.IntN(min(len(ids), 8))]}
				case n < 8 && len(ids) > 0:
					in = linearIn{op: "tag", id: ids[len(ids)-1-r.IntN(min(len(ids), 8))], key: fmt.Sprint(r.IntN(3)), value: fmt.Sprintf("%d-%d", client, i)}
				}
				mu.Unlock()
				call := now()
				out := perform(t.Context(), c, in)
				end := now()
				if out.unknown {
					end = 1 << 62 // whenever, or never
				}
				if !out.unknown || in.op != "read" {
					mu.Lock()
					history = append(history, porcupine.Operation{ClientId: client, Input: in, Call: call, Output: out, Return: end})
					mu.Unlock()
				}
				if dead.Load() {
					c, dead = born()
				}
			}
		})
	}
	wg.Wait()
	return history
}

// TestLinearizable: each history of 8 clients is one that a single catalog,
// asked one request after the other, could have had.
func TestLinearizable(t *testing.T) {
	unknown, all, undecided := 0, 0, 0
	histories := evidence.CasesIn(t, "INSTAR_CATALOG_HISTORIES", 20, 200)
	for seed := range histories {
		h := linearHistory(t, uint64(seed), 8, 500)
		for _, o := range h {
			all++
			if o.Output.(linearOut).unknown {
				unknown++
			}
		}
		// A client whose operation never returned begins others all the same:
		// each has a client of its own.
		for i := range h {
			h[i].ClientId = i
		}
		// Where much ended unknown at once, the search for an order may have no end.
		switch porcupine.CheckOperationsTimeout(linearModel, h, time.Minute) {
		case porcupine.Illegal:
			t.Fatalf("history %d of %d operations is not linearizable", seed, len(h))
		case porcupine.Unknown:
			undecided++
		}
	}
	if undecided > max(1, histories/10) {
		t.Errorf("no order was found, nor that there is none, for %d of %d histories", undecided, histories)
	}
	if unknown == 0 || unknown > all/2 {
		t.Errorf("%d of %d operations ended unknown: the faults are not what is meant", unknown, all)
	}
	t.Logf("%d operations, %d of unknown outcome", all, unknown)
}

// TestModelRefuses: the check can fail.
func TestModelRefuses(t *testing.T) {
	id := "ami-00000000000000001"
	h := []porcupine.Operation{
		{ClientId: 0, Input: linearIn{op: "register", name: "a", id: id}, Call: 0, Output: linearOut{}, Return: 1},
		{ClientId: 1, Input: linearIn{op: "read"}, Call: 2, Output: linearOut{state: ""}, Return: 3},
	}
	if porcupine.CheckOperations(linearModel, h) {
		t.Error("a read that misses what was registered before is taken")
	}
}
