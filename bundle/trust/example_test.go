package trust_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log"

	"github.com/slotota/ota/bundle/trust"
)

func newKey(name string) *trust.Signer {
	private, _, err := trust.GenerateKey(rand.Reader, name)
	if err != nil {
		log.Fatal(err)
	}
	s, err := trust.ParseSigner(private)
	if err != nil {
		log.Fatal(err)
	}
	return s
}

func signed(r *trust.Record, keys ...*trust.Signer) []byte {
	text, err := r.Text()
	if err != nil {
		log.Fatal(err)
	}
	n := trust.Note{Text: text}
	if err := n.Sign(keys...); err != nil {
		log.Fatal(err)
	}
	return n.Bytes()
}

// A device learns that the release key is another one.
func ExampleAnchor_Update() {
	alice, bob, ci, newCI := newKey("alice"), newKey("bob"), newKey("ci-1"), newKey("ci-2")
	rec := trust.Record{
		Version: 1, SecurityStep: 100,
		Root:    trust.Role{Threshold: 2, Keys: []trust.Key{alice.Key(), bob.Key()}},
		Release: trust.Role{Threshold: 1, Keys: []trust.Key{ci.Key()}},
	}
	anchor, err := trust.Open(signed(&rec, alice, bob)) // built into the firmware
	if err != nil {
		log.Fatal(err)
	}

	rec.Version, rec.Release.Keys = 2, []trust.Key{newCI.Key()}
	_, err = anchor.Update(signed(&rec, alice, ci))
	fmt.Println(errors.Is(err, trust.ErrUnsigned), err)

	anchor, err = anchor.Update(signed(&rec, alice, bob))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(anchor.Record().Version, anchor.Record().Release.Keys[0].Name())
	// Output:
	// true too few signatures: needs 2 old root keys, signed by 1
	// 2 ci-2
}
