package fetch_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/slotota/ota/fetch"
)

func ExamplePolicy() {
	// An update server in the local network, and the maker's.
	p := &fetch.Policy{Hosts: []string{"updates.example.com", "192.168.1.7:8443"}, AllowPrivate: true}
	for _, u := range []string{
		"https://updates.example.com/fw.zip?token=x",
		"https://192.168.1.7:8443/fw.zip",
		"http://updates.example.com/fw.zip?token=x",
		"https://updates.example.com@127.0.0.1/",
	} {
		_, err := p.ParseURL(u)
		fmt.Println(err, errors.Is(err, fetch.ErrPolicy))
	}
	// Output:
	// <nil> false
	// <nil> false
	// fetch: "http://updates.example.com/fw.zip": not allowed: need https true
	// fetch: "https://127.0.0.1/": not allowed: host "127.0.0.1" is not on the list true
}

func ExampleOpen() {
	ctx := context.Background()
	f, err := fetch.Open(ctx, "https://updates.example.com/fw.zip", &fetch.Options{
		Policy:   &fetch.Policy{Hosts: []string{"updates.example.com"}},
		Header:   http.Header{"Authorization": {"Bearer …"}},
		Device:   &fetch.Device{ID: "gw-17", Platform: "acme-gw2", Version: "1.2", BuildID: "20260101-000000"},
		RetryFor: 10 * time.Minute,
	})
	if errors.Is(err, fetch.ErrNotModified) {
		fmt.Println("nothing to do")
		return
	}
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	r, err := f.Stream(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer r.Close()
	// r is for Policy.Open of package bundle, or f itself for its OpenRanges.
	_, err = io.Copy(io.Discard, r)
	fmt.Println(f.Downloaded(), f.Retries(), err)
}
