// Package interop tests the library against programs of other makers, one
// folder for each. It is a module of its own, so that nobody who imports the
// library inherits what these tests need.
//
// The tests run from the folder above with
//
//	go test work
//
// and need no network, once the modules are downloaded, and no cgo. The tools of
// the project are pinned here too: go tool staticcheck and go tool apidiff.
package interop
