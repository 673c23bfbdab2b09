package bundle_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log"
	"strings"

	"github.com/slotota/ota/bundle"
)

func Example() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}

	// On the build machine:
	var file bytes.Buffer
	manifest := &bundle.Manifest{
		Name: "pump", Platform: "rpi-cm4", Version: "2.1", Security: 3,
		Parts: []bundle.Part{{Name: "rootfs", Src: "rootfs.img"}},
	}
	files := map[string]bundle.File{"rootfs.img": strings.NewReader("an image")}
	options := &bundle.WriteOptions{Keys: []crypto.Signer{key}}
	if err := bundle.Write(context.Background(), &file, manifest, files, options); err != nil {
		log.Fatal(err)
	}

	// On the device, where policy.Open instead of Verify yields the image to
	// be given to Device.Update:
	policy := &bundle.Policy{Keys: []*ecdsa.PublicKey{&key.PublicKey}}
	b, err := policy.Verify(context.Background(), &file)
	if err != nil {
		log.Fatal(err)
	}
	info := b.Info()
	fmt.Println(info.Name, info.Version, info.Security, len(info.SignedBy), info.Parts[0].Name, info.Parts[0].Size)
	// Output: pump 2.1 3 1 rootfs 8
}
