// A glass ball and two of its friends on a checkered floor; for examples/povray.xsdl.
#version 3.7;
global_settings { assumed_gamma 1.0 }

camera {
  location <0, 2.2, -6>
  look_at <0, 0.9, 0>
  angle 40
}

light_source { <4, 8, -6> color rgb <1, 0.97, 0.9> }
light_source { <-6, 4, -4> color rgb <0.25, 0.3, 0.4> shadowless }

sky_sphere {
  pigment {
    gradient y
    color_map {
      [0.0 color rgb <0.85, 0.9, 1.0>]
      [1.0 color rgb <0.25, 0.45, 0.8>]
    }
  }
}

plane {
  y, 0
  pigment { checker color rgb 0.9, color rgb <0.2, 0.3, 0.35> }
  finish { reflection 0.1 }
}

sphere {
  <0, 1, 0>, 1
  pigment { color rgbf <0.95, 1, 0.97, 0.85> }
  finish { specular 0.8 roughness 0.005 reflection 0.15 }
  interior { ior 1.45 }
}

sphere {
  <-1.7, 0.6, 1>, 0.6
  pigment { color rgb <0.85, 0.25, 0.15> }
  finish { phong 0.7 }
}

box {
  <1.1, 0, 0.6>, <2.0, 0.9, 1.5>
  rotate y * 12
  pigment { color rgb <0.95, 0.75, 0.2> }
  finish { diffuse 0.8 }
}
