package catalog

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/instar-image/instar/test/evidence"
)

// relations are how an account may stand to an image.
var relations = []string{"owner", "explicit", "public", "none", "former"}

// TestPermissionMatrix: each operation, for each relation of the caller to the
// image, in each state: who may see it and may not is told so, to who may not see
// it the answer is that for an image that does not exist.
func TestPermissionMatrix(t *testing.T) {
	operations := map[string]func(ctx context.Context, c *Catalog, call Call, id string) error{
		"Deregister": func(ctx context.Context, c *Catalog, call Call, id string) error { return c.Deregister(ctx, call, id) },
		"SetDescription": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.SetDescription(ctx, call, id, "x")
		},
		"SetTags": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.SetTags(ctx, call, []string{id}, Tags{"a": "b"})
		},
		"DeleteTags": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.DeleteTags(ctx, call, []string{id}, nil)
		},
		"Share": func(ctx context.Context, c *Catalog, call Call, id string) error {
			_, err := c.ModifyLaunchPermissions(ctx, call, id, Permissions{Accounts: []string{"555555555555"}}, Permissions{})
			return err
		},
		"Reset": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.ResetLaunchPermissions(ctx, call, id)
		},
		"Deprecate": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.SetDeprecation(ctx, call, id, c.opt.Now().AddDate(0, 1, 0))
		},
		"Protect": func(ctx context.Context, c *Catalog, call Call, id string) error {
			_, err := c.SetProtection(ctx, call, id, true, false)
			return err
		},
		"Disable": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.SetEnabled(ctx, call, id, false)
		},
		"Products": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.AddProductCodes(ctx, call, id, []ProductCode{{"c", "devpay"}})
		},
		"IMDS": func(ctx context.Context, c *Catalog, call Call, id string) error {
			return c.SetIMDSSupport(ctx, call, id, "v2.0")
		},
	}
	c := open(t, newMemory().client(nil), testSigner(t), nil)
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	caller := map[string]string{"owner": alice, "explicit": bob, "public": carol, "none": carol, "former": bob}
	n := 0
	for _, relation := range relations {
		for _, state := range []State{Available, Disabled, Pending, Failed, Deregistered} {
			n++
			m := record(t, c, alice, fmt.Sprintf("image-%d", n))
			err := c.Update(t.Context(), func(tx *Tx) error {
				_, err := tx.Change(t.Context(), m, Call{Account: alice}, "test", "", func(x *Image) error {
					x.State = state
					x.Public = relation == "public"
					if relation == "explicit" {
						x.LaunchAccounts = []string{bob}
					}
					return nil
				})
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			want := CodeAMINotFound
			switch {
			case relation == "owner" && state == Deregistered:
				want = CodeAMIUnavailable
			case relation == "owner":
				want = CodeDryRun
			case (relation == "explicit" || relation == "public") && state == Available:
				want = CodeUnauthorized
			}
			for name, f := range operations {
				got := CodeOf(f(t.Context(), c, Call{Account: caller[relation], DryRun: true}, m.ID))
				w := want
				if name == "Disable" && want == CodeDryRun && state != Available && state != Disabled {
					w = CodeState
				}
				if got != w {
					t.Errorf("%s of an image that is %s, by %s: %s, want %s", name, state, relation, got, w)
				}
			}
			// Seen by id, and in lists.
			v, err := c.View(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, err = v.Describe(t.Context(), caller[relation], Query{IDs: []string{m.ID}})
			missing := "ami-0123456789abcdef0"
			_, none := v.Describe(t.Context(), caller[relation], Query{IDs: []string{missing}})
			if want == CodeAMINotFound && err.Error() != fmt.Sprintf("The image id '[%s]' does not exist (%s)", m.ID, CodeAMINotFound) || none == nil {
				t.Errorf("%s, %s: %v, one that is not there: %v", relation, state, err, none)
			}
			if seen := err == nil; seen != (want == CodeDryRun || want == CodeUnauthorized) {
				t.Errorf("%s, %s: %v", relation, state, err)
			}
		}
	}
}

// TestPermissionsAgainstOracle: 10^5 random questions and changes, against three
// sets that say who may what.
func TestPermissionsAgainstOracle(t *testing.T) {
	c := open(t, newMemory().client(nil), testSigner(t), nil)
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(7, 7))
	accounts := []string{alice, bob, carol}
	type oracle struct {
		owner          string
		public         bool
		shared         map[string]bool
		disabled, gone bool
	}
	images := map[string]*oracle{}
	var ids []string
	visible := func(o *oracle, who string) bool {
		return !o.gone && (o.owner == who || !o.disabled && (o.public || o.shared[who]))
	}
	v, err := c.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range evidence.CasesIn(t, "INSTAR_CATALOG_QUESTIONS", 100_000, 1_000_000) {
		who := accounts[r.IntN(3)]
		if i%50 == 0 { // a change
			call := Call{Account: who}
			if len(ids) < 20 || r.IntN(10) == 0 {
				m := record(t, c, who, fmt.Sprintf("image-%d", i))
				images[m.ID], ids = &oracle{owner: who, shared: map[string]bool{}}, append(ids, m.ID)
			} else {
				id := ids[r.IntN(len(ids))]
				o, other := images[id], accounts[r.IntN(3)]
				may := o.owner == who && !o.gone
				var err error
				switch r.IntN(6) {
				case 0:
					_, err = c.ModifyLaunchPermissions(t.Context(), call, id, Permissions{Accounts: []string{other}}, Permissions{})
					if may {
						o.shared[other] = true
					}
				case 1:
					_, err = c.ModifyLaunchPermissions(t.Context(), call, id, Permissions{}, Permissions{Accounts: []string{other}, Public: true})
					if may {
						o.public = false
						delete(o.shared, other)
					}
				case 2:
					_, err = c.ModifyLaunchPermissions(t.Context(), call, id, Permissions{Public: true}, Permissions{})
					if may {
						o.public = true
					}
				case 3:
					err = c.SetEnabled(t.Context(), call, id, false)
					if may && !o.disabled {
						o.disabled, o.public, o.shared = true, false, map[string]bool{}
					}
				case 4:
					err = c.SetEnabled(t.Context(), call, id, true)
					if may {
						o.disabled = false
					}
				case 5:
					if r.IntN(4) > 0 {
						break
					}
					err = c.Deregister(t.Context(), call, id)
					if may {
						o.gone = true
					}
				}
				if may && err != nil {
					t.Fatalf("%d: %v", i, err)
				}
			}
			if v, err = c.View(t.Context()); err != nil {
				t.Fatal(err)
			}
			continue
		}
		id := ids[r.IntN(len(ids))]
		o := images[id]
		_, see := v.See(t.Context(), who, id)
		_, own := v.Own(t.Context(), who, id)
		m, err := v.Image(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		want := visible(o, who)
		launch := want && !o.disabled
		if (see == nil) != want || m.Visible(who) != want || m.Launchable(who) != launch || (own == nil) != (want && o.owner == who) {
			t.Fatalf("%d: %s, %s: see %v, own %v; %+v", i, id, who, see, own, o)
		}
		if !want && CodeOf(see) != map[bool]string{true: CodeAMIUnavailable, false: CodeAMINotFound}[o.gone && o.owner == who] {
			t.Fatalf("%d: %v", i, see)
		}
	}
}
