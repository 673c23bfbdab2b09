module github.com/slotota/ota/interop

go 1.26.0

replace github.com/slotota/ota => ..

require (
	github.com/anishathalye/porcupine v1.3.1
	github.com/mongoose-os/mos v0.0.0-20230313140341-b44964e63a92
	github.com/rogpeppe/go-internal v1.16.0
	github.com/slotota/ota v0.0.0
	github.com/spf13/pflag v1.0.5
	github.com/stretchr/testify v1.12.1
	pgregory.net/rapid v1.3.0
)

require (
	cloud.google.com/go v0.97.0 // indirect
	cloud.google.com/go/pubsub v1.3.1 // indirect
	github.com/BurntSushi/toml v1.4.1-0.20240526193622-a339e1f7089c // indirect
	github.com/cesanta/go-serial v0.0.0-20170105152649-4dff7aff019e // indirect
	github.com/eclipse/paho.mqtt.golang v1.1.2-0.20181011101702-c95f2f508baf // indirect
	github.com/go-logr/logr v1.1.0 // indirect
	github.com/golang/groupcache v0.0.0-20210331224755-41bb18bfe9da // indirect
	github.com/golang/protobuf v1.5.2 // indirect
	github.com/google/go-cmp v0.7.0 // indirect
	github.com/googleapis/gax-go/v2 v2.1.0 // indirect
	github.com/juju/errors v0.0.0-20200330140219-3fe23663418f // indirect
	go.opencensus.io v0.23.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/exp v0.0.0-20261014143641-f0251eb4aa3e // indirect
	golang.org/x/exp/typeparams v0.0.0-20231108232855-2478ac86f678 // indirect
	golang.org/x/mod v0.42.0 // indirect
	golang.org/x/net v0.61.0 // indirect
	golang.org/x/oauth2 v0.0.0-20210819190943-2bc19b11175f // indirect
	golang.org/x/sync v0.24.0 // indirect
	golang.org/x/sys v0.49.0
	golang.org/x/text v0.43.0 // indirect
	golang.org/x/tools v0.52.0 // indirect
	google.golang.org/api v0.57.0 // indirect
	google.golang.org/appengine v1.6.7 // indirect
	google.golang.org/genproto v0.0.0-20210924002016-3dee208752a0 // indirect
	google.golang.org/grpc v1.40.0 // indirect
	google.golang.org/protobuf v1.27.1 // indirect
	honnef.co/go/tools v0.8.2 // indirect
	k8s.io/klog/v2 v2.20.0 // indirect
)

tool (
	golang.org/x/exp/cmd/apidiff
	honnef.co/go/tools/cmd/staticcheck
)
