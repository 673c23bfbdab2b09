package fetch_test

import (
	"errors"
	"fmt"

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
