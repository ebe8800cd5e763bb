package catalog

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/instar-image/instar/test/evidence"
)

// TestIDsAreNeverUsedAgain: of 10^5 changes by many at once every new image has
// an id that none had before, an id that was deregistered stays so, and its name
// is free.
func TestIDsAreNeverUsedAgain(t *testing.T) {
	mem, signer := newMemory(), testSigner(t)
	c := open(t, mem.client(nil), signer, nil)
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	ops := evidence.CasesIn(t, "INSTAR_CATALOG_OPS", 100_000, 1_000_000)
	const workers = 1024
	var mu sync.Mutex
	seen := map[string]bool{} // true: deregistered
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(w)))
			name := fmt.Sprintf("name-%d", w%(workers/2))
			mine := ""
			for range ops / workers / 4 {
				// A batch of changes is one transaction, as one request is.
				before, id := mine, ""
				var drawn, gone []string
				err := c.Update(t.Context(), func(tx *Tx) error {
					id, drawn, gone = before, nil, nil
					for range 4 {
						if id != "" && r.IntN(2) == 0 {
							m, err := tx.Image(t.Context(), id)
							if err != nil {
								return err
							}
							_, err = tx.Change(t.Context(), m, Call{Account: alice}, "DeregisterImage", "", func(n *Image) error {
								n.State, n.Deregistered = Deregistered, tx.Now()
								return nil
							})
							if err != nil {
								return err
							}
							gone = append(gone, id)
							id = ""
							continue
						}
						if id != "" {
							continue
						}
						n, err := tx.newID(t.Context(), "ami")
						if err != nil {
							return err
						}
						m := &Image{ID: n, Name: name, Owner: alice, State: Available, Created: tx.Now(), Kind: KindNone, RootDeviceType: "ebs"}
						m.defaults()
						if _, err := tx.create(t.Context(), m, Call{Account: alice}, "RegisterImage", ""); err != nil {
							return err
						}
						drawn = append(drawn, n)
						id = n
					}
					return nil
				})
				var refusal *Error
				if err != nil && !(errors.As(err, &refusal) && refusal.Code == CodeAMINameDuplicate) {
					t.Error(err)
					return
				}
				if refusal != nil { // the name is the other's who has it; nothing was done
					continue
				}
				mine = id
				mu.Lock()
				for _, n := range drawn {
					if _, was := seen[n]; was {
						t.Errorf("%s is used again", n)
					}
					seen[n] = false
				}
				for _, n := range gone {
					seen[n] = true
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	v, err := c.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for m, err := range v.Images(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		gone, was := seen[m.ID]
		if !was || gone != (m.State == Deregistered) {
			t.Fatalf("%s is %s; it was made: %v, deregistered: %v", m.ID, m.State, was, gone)
		}
		_, err := v.See(t.Context(), alice, m.ID)
		if want := map[bool]string{true: CodeAMIUnavailable}[gone]; CodeOf(err) != want {
			t.Fatalf("%s: %v", m.ID, err)
		}
	}
	t.Logf("%d ids", n)
}
